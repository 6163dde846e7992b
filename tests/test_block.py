"""The block's fast ways of running equal its plain one: fused projections, recomputed gates, compiled functions."""

import copy
import io
from concurrent.futures import ThreadPoolExecutor

import pytest
import safetensors.torch
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from timm.layers import SwiGLU
from torch._dynamo.utils import counters
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from apt_backbones import freeze_host
from apt_backbones.block import Call, FusedBlock, _mlp, run_block
from apt_backbones.fused import FusedLinears
from benchmarks.clock import saved_bytes
from tests.golden import relative_error
from tests.test_eva02 import WINDOWS, pictures, tiny

THRESHOLDS = {32: 6.0, 64: 5.0}
IMAGES = [(1, 128, 128), (2, 128, 96), (1, 64, 128), (3, 48, 80), (2, 112, 128), (1, 160, 96), (1, 16, 48)]


def layers(*outputs, bias=(True, False, True), inputs=12):
    return [torch.nn.Linear(inputs, n, bias=b).requires_grad_(False) for n, b in zip(outputs, bias)]


def assert_fused(fused, parts, x):
    expected = torch.cat([part(x) for part in parts], dim=-1)
    torch.testing.assert_close(torch.nn.functional.linear(x, *fused.fuse(parts)), expected, atol=1e-5, rtol=0)


def test_fused_weights_are_the_layers_own_memory():
    fused, parts, x = FusedLinears(), layers(12, 12, 8), torch.randn(5, 12)
    assert_fused(fused, parts, x)
    weight, bias = fused.fuse(parts)
    assert fused.fuse(parts)[0] is weight, "fused once"
    own = {part.weight.untyped_storage().data_ptr() for part in parts}
    assert own == {weight.untyped_storage().data_ptr()}
    assert torch.equal(bias[12:24], torch.zeros(12)), "the second layer has no bias"


def assign(parts):
    parts[1].weight = torch.nn.Parameter(torch.randn(12, 12), requires_grad=False)


def step(parts):
    for part in parts:
        part.weight.requires_grad_()
    optimizer = torch.optim.AdamW([part.weight for part in parts], lr=0.5)
    sum(part(torch.ones(12)).sum() for part in parts).backward()
    optimizer.step()
    for part in parts:
        part.weight.requires_grad_(False)


CHANGES = {
    "in place": lambda parts: parts[2].weight.mul_(3),
    "through data": lambda parts: parts[2].bias.data.copy_(torch.randn(8)),
    "new data": lambda parts: setattr(parts[0].bias, "data", torch.randn(12)),
    "assignment": assign,
    "optimizer": step,
    "load_state_dict": lambda parts: parts[0].load_state_dict(layers(12)[0].state_dict()),
    "load_state_dict(assign=True)": lambda parts: parts[0].load_state_dict(layers(12)[0].state_dict(), assign=True),
    "double": lambda parts: [part.double() for part in parts],
    "double and back": lambda parts: [part.double().float().bfloat16().float() for part in parts],
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_fused_weights_are_never_stale(change):
    fused, parts = FusedLinears(), layers(12, 12, 8)
    fused.fuse(parts)
    before = [part(torch.ones(12, dtype=part.weight.dtype)) for part in parts]
    change(parts)
    x = torch.ones(12, dtype=parts[0].weight.dtype)
    assert any(not torch.equal(part(x), old) for part, old in zip(parts, before))
    assert_fused(fused, parts, x)


def test_layers_that_train_or_are_no_plain_linear_layers_are_left_alone():
    parts = layers(12, 12, 8)
    addresses = [part.weight.data_ptr() for part in parts]
    for trained in (parts[1].weight, parts[2].bias):
        trained.requires_grad_()
        assert FusedLinears().fuse(parts) is None
        trained.requires_grad_(False)

    class Adapted(torch.nn.Linear):
        pass

    assert FusedLinears().fuse([*parts[:2], Adapted(12, 8).requires_grad_(False)]) is None
    assert [part.weight.data_ptr() for part in parts] == addresses


@pytest.mark.parametrize("options", [WINDOWS, dict(use_cls_token=True)])
def test_a_frozen_trunk_equals_itself_unfrozen_under_the_same_names(options):
    model = tiny(thresholds=THRESHOLDS, **options)
    names, images = list(model.state_dict()), pictures(2, 128, 96)
    with torch.no_grad():
        expected = model(images)[0]
        torch.testing.assert_close(freeze_host(model)(images)[0], expected, atol=1e-5, rtol=0)
    assert list(model.state_dict()) == names


def reload_pickle(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, reload_pickle], ids=["deepcopy", "pickle"])
def test_copies_of_a_frozen_trunk_have_weights_of_their_own(copied):
    model, images = tiny(thresholds=THRESHOLDS, **WINDOWS).requires_grad_(False), pictures(1, 128, 128)
    expected = model(images)[0]
    twin = copied(model)
    assert torch.equal(twin(images)[0], expected)
    for parameter in twin.parameters():
        parameter.mul_(1.1)
    assert torch.equal(model(images)[0], expected) and not torch.equal(twin(images)[0], expected)


def test_a_frozen_trunk_is_saved_once_and_loads_elsewhere():
    model, images = tiny(thresholds=THRESHOLDS, **WINDOWS).requires_grad_(False), pictures(1, 128, 128)
    file, plain = io.BytesIO(), io.BytesIO()
    torch.save(model.state_dict(), plain)
    expected = model(images)[0]
    torch.save(model.state_dict(), file)
    assert file.tell() < 1.05 * plain.tell()
    file.seek(0)
    other = tiny(seed=1, thresholds=THRESHOLDS, **WINDOWS).requires_grad_(False)
    other(images)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other(images)[0], expected)


@pytest.mark.parametrize("options", [WINDOWS, dict(use_cls_token=True)])
def test_a_frozen_block_stores_no_inputs_of_its_weights(options):
    """Of every token: the inputs of both norms, q, k, v, what attention made of them, and SwiGLU's two products."""
    model, images = freeze_host(tiny(thresholds=THRESHOLDS, **options)), pictures(2, 128, 128)
    layout = model.layout(images)
    x = torch.randn(layout.num_tokens, 48, requires_grad=True)
    block, rotation, fused = model.blocks[0], model.rotations(layout)[0], FusedBlock()
    forward = lambda: run_block(block, x, Call(layout), layout.images, rotation, fused)  # noqa: E731
    forward()  # fuses the weights
    hidden = block.mlp.fc2.in_features
    statistics = 2 * 2 * 4 + 3 * 4  # bytes: mean and deviation of two norms, log-sum-exp of three heads
    expected = layout.num_tokens * (4 * (6 * 48 + 2 * hidden) + statistics)
    measured = saved_bytes(forward, block) - rotation.nbytes
    assert expected * 0.95 <= measured <= expected * 1.05


def test_dropout_within_an_mlp_is_the_same_in_both_passes():
    mlp, x = SwiGLU(8, 16, drop=0.5).train(), torch.randn(5, 8, requires_grad=True)
    gradients = []
    for run in (mlp, lambda x: _mlp(mlp, x, None)):
        torch.manual_seed(0)
        gradients += torch.autograd.grad(run(x).sum(), x)
    assert torch.equal(*gradients)


def test_the_short_fine_tune_stores_less_than_full_fine_tuning():
    images = pictures(2, 128, 128)
    stored = {}
    for freeze in (True, False):
        model = tiny(thresholds=THRESHOLDS, **WINDOWS)
        model = freeze_host(model) if freeze else model
        model(images)
        stored[freeze] = saved_bytes(lambda: model(images)[0], model)  # noqa: B023
    assert stored[True] < 0.8 * stored[False]


def compiled(model):
    """Counts graphs and traces what a compiler would, without waiting for one."""
    torch._dynamo.reset()
    counters.clear()
    return copy.deepcopy(model).compile_blocks(backend="aot_eager")


@pytest.mark.parametrize("padding", ["coarsest", "drop"])
@pytest.mark.parametrize("options", [WINDOWS, dict(use_cls_token=True, adapter_rank=2)])
@pytest.mark.parametrize("freeze", [True, False])
def test_compiled_blocks_compile_once_for_all_images(padding, options, freeze):
    model = tiny(thresholds=THRESHOLDS, padding=padding, **options)
    model = freeze_host(model) if freeze else model
    fast = compiled(model)
    counts = set()
    with torch.no_grad():
        for shape in IMAGES:
            images = torch.nn.functional.pad(pictures(*shape), (0, 32))
            torch.testing.assert_close(fast(images)[0], model(images)[0], atol=1e-5, rtol=0)
            counts.add(model.last_layout.num_tokens)
    assert len(counts) >= 6
    # One graph before and one after the attention kernel, for all blocks.
    assert counters["stats"]["unique_graphs"] == 2 and not counters["graph_break"]


@torch.no_grad()
def test_blocks_compile_with_all_that_torch_compile_takes():
    model, images, seen = tiny(thresholds=THRESHOLDS, **WINDOWS), pictures(1, 64, 128), []

    def backend(graph, inputs, **options):
        seen.append(options)
        return graph.forward

    expected = model(images)[0]
    for options in (dict(options={"trace": True}), dict(dynamic=False)):
        torch._dynamo.reset()
        torch.testing.assert_close(model.compile_blocks(backend=backend, **options)(images)[0], expected)
    assert seen[0] == {"options": {"trace": True}} and len(seen) > 2


@pytest.mark.parametrize("freeze", [True, False])
def test_compiled_blocks_train_alike(freeze):
    model = tiny(thresholds=THRESHOLDS, **WINDOWS)
    model = freeze_host(model) if freeze else model
    fast = compiled(model)
    for shape in IMAGES[:3]:
        gradients = []
        for each in (model, fast):
            each.zero_grad()
            each(pictures(*shape))[0].square().mean().backward()
            gradients.append({name: p.grad for name, p in each.named_parameters() if p.requires_grad})
        for name, gradient in gradients[0].items():
            torch.testing.assert_close(gradients[1][name], gradient, atol=1e-6, rtol=1e-4)
    assert counters["stats"]["unique_graphs"] == 2 and not counters["graph_break"]


@pytest.mark.slow
def test_blocks_compiled_to_machine_code_equal_eager_ones():
    model = tiny(thresholds=THRESHOLDS, **WINDOWS).requires_grad_(False)
    torch._dynamo.reset()
    counters.clear()
    fast = copy.deepcopy(model).compile_blocks()
    for shape in IMAGES:
        images = pictures(*shape)
        torch.testing.assert_close(fast(images)[0], model(images)[0], atol=1e-5, rtol=0)
    assert counters["stats"]["unique_graphs"] == 2


@pytest.mark.gpu
def test_blocks_compiled_for_a_gpu_equal_eager_ones():
    model = freeze_host(tiny(thresholds=THRESHOLDS, **WINDOWS)).cuda().bfloat16()
    torch._dynamo.reset()
    counters.clear()
    fast = copy.deepcopy(model).compile_blocks()
    with torch.no_grad():
        for shape in IMAGES:
            images = pictures(*shape).cuda()
            expected = model(images)[0].float()
            assert relative_error(fast(images)[0].float(), expected) < 0.02
    assert counters["stats"]["unique_graphs"] == 2


def test_savers_keep_every_weight_of_a_frozen_trunk_that_ran(tmp_path):
    model, images = freeze_host(tiny(thresholds=THRESHOLDS, **WINDOWS)), pictures(1, 128, 80)
    names = set(model.state_dict())
    expected = model(images)[0]
    safetensors.torch.save_model(model, tmp_path / "model.safetensors")
    assert set(load_file(tmp_path / "model.safetensors")) == names
    torch.testing.assert_close(model(images)[0], expected, atol=1e-6, rtol=0)
    for tensor in model.state_dict().values():  # as some averages of weights are kept
        tensor.zero_()
    assert not any(parameter.any() for parameter in model.parameters())


@pytest.mark.parametrize(
    "change",
    [lambda model: model.to("cpu"), lambda model: model.float(), lambda model: model.share_memory(), reload_pickle],
    ids=["to", "float", "share_memory", "pickle"],
)
def test_no_two_weights_share_memory_after_a_frozen_trunk_ran_and(change):
    """accelerate's ``save_model`` would leave out all but one of them."""
    model = freeze_host(tiny(thresholds=THRESHOLDS, **WINDOWS))
    model(pictures(1, 128, 80))
    parameters = list(change(model).parameters())
    assert len({part.untyped_storage().data_ptr() for part in parameters}) == len(parameters)


@torch.no_grad()
def test_several_threads_may_call_a_trunk():
    model = freeze_host(tiny(thresholds=THRESHOLDS, **WINDOWS))
    images = [pictures(*shape) for shape in IMAGES]
    expected = [model(batch)[0] for batch in images]
    with ThreadPoolExecutor(4) as threads:
        for number, found in enumerate(threads.map(lambda batch: model(batch)[0], images * 8)):
            torch.testing.assert_close(found, expected[number % len(images)], atol=1e-6, rtol=0)


def test_hooks_and_adapters_on_blocks_and_fused_layers_act():
    model, images = freeze_host(tiny(thresholds=THRESHOLDS, **WINDOWS)), pictures(1, 128, 80)
    expected = model(images)[0]
    seen = []
    model.blocks[1].attn.k_proj.register_forward_hook(lambda *_: seen.append("k_proj"))
    model.blocks[2].mlp.fc1_g.register_forward_hook(lambda module, inputs, output: 0 * output)
    changed = model(images)[0]
    assert seen == ["k_proj"] and not torch.allclose(changed, expected)
    model.blocks[0].register_forward_hook(lambda block, inputs, output: seen.append(output.shape) or 2 * output)
    assert not torch.allclose(model(images)[0], changed)
    assert seen[1:] == [(model.last_layout.num_tokens, model.embed_dim), "k_proj"]


def test_a_block_that_trains_beside_adapters_is_the_block_that_runs():
    """PEFT wraps it in a module of its own."""
    model, images = tiny(thresholds=THRESHOLDS, **WINDOWS), pictures(1, 128, 80)
    expected = model(images)[0]
    peft = get_peft_model(model, LoraConfig(target_modules=["proj"], modules_to_save=["blocks.1"]))
    torch.testing.assert_close(model(images)[0], expected, atol=1e-6, rtol=0)
    model.blocks[1].modules_to_save["default"].mlp.fc2.weight.data.mul_(2)
    assert not torch.allclose(model(images)[0], expected)
    peft.disable_adapter_layers()
    torch.testing.assert_close(model(images)[0], expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    "wrap", [lambda block: torch.compile(block, backend="eager"), checkpoint_wrapper], ids=["compiled", "checkpointed"]
)
def test_blocks_in_wrappers_whose_work_would_be_passed_by_are_refused(wrap):
    model = tiny(thresholds=THRESHOLDS, **WINDOWS)
    model.blocks[1] = wrap(model.blocks[1])
    with pytest.raises(TypeError, match=r"wrapped in .*use compile_blocks\(\) .* set_grad_checkpointing"):
        model(pictures(1, 128, 80))


def test_a_trunk_that_was_given_more_blocks_runs_them_once_it_was_moved():
    model, deeper, images = tiny(depth=2), tiny(depth=4), pictures(1, 64, 64)
    model.blocks, deeper.patch_embed, deeper.pos_embed = deeper.blocks, model.patch_embed, model.pos_embed
    assert torch.equal(model.to("cpu").feature_maps(images, [3])[0], deeper.feature_maps(images, [3])[0])


def test_a_model_built_without_memory_equals_the_original():
    """As accelerate and FSDP build models: on the meta device, then filled."""
    model, images = tiny(thresholds=THRESHOLDS, **WINDOWS), pictures(2, 128, 96)
    with torch.device("meta"):
        empty = tiny(thresholds=THRESHOLDS, **WINDOWS)
    filled = empty.to_empty(device="cpu")
    filled.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(filled(images)[0], model(images)[0])
        assert filled.last_layout.num_patches == model.last_layout.num_patches
