"""Multi-scale test of eva02_l_dense_640."""

_base_ = "eva02_l_dense_640.py"
model = dict(_delete_=True, type="SegTTAModel", module={{_base_.model}})
test_dataloader = dict(dataset=dict(pipeline={{_base_.tta_pipeline}}))
