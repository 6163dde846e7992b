"""Test only: images keep their rectangle and are padded to what the pyramid needs, instead of to a square."""

_base_ = "eva02_b_apt_1536.py"
model = dict(data_preprocessor=dict(pad_size_divisor=32))
