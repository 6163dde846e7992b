"""Packing: exact cover, contiguous windows, and maps that come back as they went in (properties, by hypothesis)."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from apt_backbones import PatchLayout, score_patches, select_patches


@st.composite
def layouts(draw, most_prefix=0, drops=False):
    """A selection on images with smooth and busy areas, some of its patches dropped if so asked, and the layout built
    from it."""
    patch = 4
    levels = draw(st.integers(0, 2))
    sizes = tuple(patch << (level + 1) for level in range(levels))
    largest = (1 << levels) * patch
    height, width = draw(st.integers(1, 60)), draw(st.integers(1, 60))
    batch = draw(st.integers(1, 3))
    prefix = draw(st.integers(0, most_prefix))
    window = None if prefix else draw(st.sampled_from([None, largest // patch, 2 * largest // patch]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    busy = torch.rand(batch, 1, -(-height // 8), -(-width // 8), generator=generator) < draw(st.floats(0, 1))
    noise = torch.rand(batch, 3, height, width, generator=generator) * 255
    images = noise * busy.repeat_interleave(8, 2).repeat_interleave(8, 3)[:, :, :height, :width]
    if sizes:
        thresholds = {size: draw(st.sampled_from([0.0, 1.0, 3.0, float("inf")])) for size in sizes}
        sides = select_patches(score_patches(images, sizes), thresholds, patch, (height, width))
    else:
        sides = torch.full((batch, -(-height // patch), -(-width // patch)), patch)
    layout = PatchLayout.build(sides, patch, sizes, window, prefix)
    if not drops:
        return layout, sides
    kept = torch.rand(layout.num_tokens, generator=generator) < 0.6
    kept[layout.token_BHW[:, 0, 0]] = True
    sides = sides.where(kept[layout.token_BHW], 0)
    return PatchLayout.build(sides, patch, sizes, window, prefix), sides


@given(layouts(most_prefix=2))
def test_every_cell_is_covered_exactly_once(case):
    layout, sides = case
    covered = torch.zeros_like(sides)
    for image, row, column, side in zip(layout.image_T, layout.row_T, layout.column_T, layout.side_T):
        cells = int(side) // layout.patch_size
        if cells:
            area = (image, slice(row, row + cells), slice(column, column + cells))
            assert sides[area].shape == (cells, cells), "no patch sticks out"
            assert (sides[area] == side).all()
            covered[area] += 1
    assert (covered == 1).all()
    assert layout.num_empty == 0


@given(layouts())
def test_tokens_are_ordered_by_image_window_row_column(case):
    layout, _ = case
    window = layout.window or 10**6
    keys = list(
        zip(
            layout.image_T.tolist(),
            (layout.row_T // window).tolist(),
            (layout.column_T // window).tolist(),
            layout.row_T.tolist(),
            layout.column_T.tolist(),
        )
    )
    assert keys == sorted(set(keys))


@given(layouts(most_prefix=2))
def test_segments_are_the_contiguous_runs_of_images_and_windows(case):
    layout, sides = case
    window = layout.window or 10**6
    columns = -(-sides.shape[2] // window)
    window_T = layout.row_T // window * columns + layout.column_T // window
    for segments, same in (
        (layout.images, [layout.image_T]),
        (layout.windows, [layout.image_T, window_T] if layout.window else [layout.image_T]),
    ):
        assert segments.cu_seqlens.tolist() == [0, *torch.tensor(segments.lengths).cumsum(0).tolist()]
        assert segments.cu_seqlens.dtype == torch.int32
        assert segments.max_length == max(segments.lengths) and sum(segments.lengths) == layout.num_tokens
        owners = [
            {tuple(int(x[t]) for x in same) for t in range(start, end)}
            for start, end in zip(segments.cu_seqlens[:-1], segments.cu_seqlens[1:])
        ]
        assert all(len(owner) <= 1 for owner in owners), "one image and window per segment"
        assert len(set.union(*owners)) == sum(map(len, owners)), "one segment per image and window"


@given(layouts(most_prefix=2))
def test_maps_constant_on_each_patch_survive_the_round_trip(case):
    layout, sides = case
    tokens = torch.randn(layout.num_tokens, 3)
    tokens[layout.is_prefix_T] = 0
    feature_map = layout.to_map(tokens)
    assert feature_map.shape == (len(sides), 3, *sides.shape[1:])
    assert torch.equal(layout.from_map(feature_map), tokens)
    assert torch.equal(layout.to_map(layout.from_map(feature_map)), feature_map)
    assert torch.equal(layout.side_T[layout.token_BHW], sides)


@given(layouts(most_prefix=2, drops=True), st.integers(1, 3))
def test_interpolated_maps_keep_the_mean_of_every_patch(case, scale):
    layout, _ = case
    tokens = torch.randn(layout.num_tokens, 3, generator=torch.Generator().manual_seed(0))
    interpolated = layout.finer(layout.interpolate(layout.to_map(tokens)), scale)
    token_BHW = layout.refine(layout.token_BHW[:, None], scale)[:, 0]
    assert torch.equal(interpolated.movedim(1, 3)[token_BHW < 0], torch.zeros(int((token_BHW < 0).sum()), 3))
    for token in range(layout.num_tokens):
        cells = interpolated.movedim(1, 3)[token_BHW == token]
        if len(cells) == 1:
            assert torch.equal(cells[0], tokens[token])
        elif len(cells):
            torch.testing.assert_close(cells.mean(0), tokens[token], rtol=1e-4, atol=1e-5)


@given(layouts(most_prefix=2, drops=True), st.integers(1, 3))
def test_cells_without_a_token_do_not_count_in_interpolated_maps(case, scale):
    layout, _ = case
    tokens = torch.ones(layout.num_tokens, 2, requires_grad=True)
    interpolated = layout.finer(layout.interpolate(layout.to_map(tokens)), scale)
    has_token = layout.refine((layout.token_BHW >= 0)[:, None].float(), scale)
    torch.testing.assert_close(interpolated, has_token.expand_as(interpolated))
    interpolated.sum().backward()
    assert tokens.grad.isfinite().all()


@pytest.mark.parametrize("sizes", [(8,), (8, 16)])
def test_interpolation_takes_means_of_neighbours_and_moves_them_to_the_tokens(sizes):
    sides = torch.full((1, 6, 8), 4)
    sides[0, :2, 2:4] = 8
    if 16 in sizes:
        sides[0, :4, 4:] = 16
    layout = PatchLayout.build(sides, 4, sizes)
    repeated = layout.to_map(torch.randn(layout.num_tokens, 3))
    expected = repeated
    for _ in range(max(sizes) // 8):
        expected = F.avg_pool2d(expected, 3, stride=1, padding=1, count_include_pad=False)
    for token in range(layout.num_tokens):
        row, column = layout.row_T[token], layout.column_T[token]
        cells = expected[0, :, layout.token_BHW[0] == token]
        moved = cells - cells.mean(1, keepdim=True) + repeated[0, :, row, column, None]
        expected[0, :, layout.token_BHW[0] == token] = moved
    torch.testing.assert_close(layout.interpolate(repeated), expected)


@pytest.mark.parametrize("scale", [2, 3])
def test_finer_maps_take_means_of_neighbours_and_moves_them_to_the_base_cells(scale):
    layout = PatchLayout.dense(1, (6, 8), 4)
    cells = torch.randn(1, 3, 6, 8)
    near = F.interpolate(cells, scale_factor=scale, mode="nearest")
    near = F.avg_pool2d(near, 3, stride=1, padding=1, count_include_pad=False)
    moved = F.interpolate(cells - F.avg_pool2d(near, scale), scale_factor=scale, mode="nearest")
    torch.testing.assert_close(layout.finer(cells, scale), near + moved)


def test_autocast_does_not_change_interpolated_maps():
    """Nor did it when they were pooled: products are what it rounds."""
    sides = torch.full((1, 6, 8), 4)
    sides[0, :2, 2:4] = 8
    sides[0, :, 6:] = 0
    layout = PatchLayout.build(sides, 4, (8,))
    repeated = layout.to_map(torch.randn(layout.num_tokens, 3))
    expected = layout.finer(layout.interpolate(repeated), 2)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layout.finer(layout.interpolate(repeated), 2), expected)


@given(layouts(most_prefix=2))
def test_a_batch_is_its_images_one_after_the_other(case):
    layout, sides = case
    tokens = torch.arange(layout.num_tokens)[:, None]
    maps = layout.interpolate(layout.to_map(tokens.double()))
    sizes = tuple(layout.sizes)[1:]
    for image, part in enumerate(layout.split(tokens)):
        alone = PatchLayout.build(sides[image : image + 1], layout.patch_size, sizes, layout.window, layout.num_prefix)
        assert alone.num_patches == (len(part),) == layout.num_patches[image : image + 1]
        for name in ("row_T", "column_T", "side_T"):
            assert torch.equal(getattr(alone, name)[alone.num_prefix :], getattr(layout, name)[part[:, 0]])
        of_image = tokens.double().split(layout.images.lengths)[image]
        torch.testing.assert_close(alone.interpolate(alone.to_map(of_image))[0], maps[image])


@given(layouts(most_prefix=2))
def test_sizes_index_the_tokens_of_each_size(case):
    layout, _ = case
    for size, index in layout.sizes.items():
        assert sorted(index.tolist()) == (layout.side_T == size).nonzero()[:, 0].tolist()


def test_to_map_is_differentiable_and_sums_over_repeated_cells():
    sides = torch.full((1, 2, 4), 16)
    sides[0, :, :2] = 32
    layout = PatchLayout.build(sides, 16, (32,))
    tokens = torch.randn(layout.num_tokens, 2, requires_grad=True)
    layout.to_map(tokens).sum().backward()
    assert tokens.grad[:, 0].tolist() == [4, 1, 1, 1, 1]


def test_the_last_windows_of_a_ragged_grid_are_smaller():
    layout = PatchLayout.dense(1, (3, 5), 16, window=2)
    assert layout.windows.lengths == (4, 4, 2, 2, 2, 1)


def test_dropped_cells_are_zero_or_repeat_the_token_before_them():
    sides = torch.tensor([[[0, 16, 0], [16, 0, 0]]])
    tokens = torch.tensor([[1.0], [2.0]])
    empty = PatchLayout.build(sides, 16)
    assert empty.to_map(tokens)[0, 0].tolist() == [[0, 1, 0], [2, 0, 0]]
    filled = PatchLayout.build(sides, 16, fill_dropped=True)
    assert filled.to_map(tokens)[0, 0].tolist() == [[1, 1, 1], [2, 2, 2]]


def test_dropped_cells_never_repeat_a_prefix_token():
    layout = PatchLayout.build(torch.tensor([[[0, 16], [16, 0]]] * 2), 16, num_prefix=1, fill_dropped=True)
    tokens = torch.tensor([[9.0], [1], [2], [9], [3], [4]])
    assert layout.to_map(tokens)[:, 0].tolist() == [[[1, 1], [2, 2]], [[3, 3], [4, 4]]]


def test_cells_of_a_merged_patch_approach_their_neighbours():
    sides = torch.tensor([[[8, 8, 4, 0], [8, 8, 4, 0]]])
    layout = PatchLayout.build(sides, 4, (8,))
    repeated = layout.to_map(torch.tensor([[0.0], [6.0], [6.0]]))
    assert repeated[0, 0].tolist() == [[0, 0, 6, 0], [0, 0, 6, 0]]
    # The mean of a cell and its neighbours that have a token is 0 at the left edge and 2 beside the base patches.
    assert layout.interpolate(repeated)[0, 0].tolist() == [[-1, 1, 6, 0], [-1, 1, 6, 0]]
    constant = layout.to_map(torch.ones(3, 1))
    torch.testing.assert_close(layout.interpolate(constant), constant, msg="cells without a token do not count")


@pytest.mark.parametrize("scale", [1, 2])
def test_interpolated_maps_are_channels_last_in_memory(scale):
    """On a CPU pooling is ten times slower on maps that are not."""
    sides = torch.tensor([[[8, 8, 4, 4], [8, 8, 4, 4]]])
    layout = PatchLayout.build(sides, 4, (8,))
    maps = layout.finer(layout.interpolate(layout.to_map(torch.randn(layout.num_tokens, 6))), scale)
    assert maps.is_contiguous(memory_format=torch.channels_last)


def test_dropped_windows_have_no_tokens():
    sides = torch.full((1, 2, 4), 16)
    sides[:, :, :2] = 0
    layout = PatchLayout.build(sides, 16, window=2)
    assert layout.windows.lengths == (0, 4)
    assert layout.to_map(torch.ones(4, 1))[0, 0].tolist() == [[0, 0, 1, 1], [0, 0, 1, 1]]


def test_dense_layouts_are_built_once_per_shape():
    assert PatchLayout.dense(2, (4, 6), 16, window=2) is PatchLayout.dense(2, (4, 6), 16, window=2)


def test_the_prefix_tokens_of_an_image_are_a_segment_beside_its_windows():
    layout = PatchLayout.dense(2, (2, 4), 16, window=2, num_prefix=3)
    assert layout.images.lengths == (11, 11)
    assert layout.windows.lengths == (3, 4, 4, 3, 4, 4)
    assert layout.windows.cu_seqlens.tolist() == [0, 3, 7, 11, 14, 18, 22]
    tokens = torch.arange(22.0)[:, None]
    assert layout.prefix(tokens)[..., 0].tolist() == [[0, 1, 2], [11, 12, 13]]
    assert layout.to_sequence(tokens)[0, :, 0].tolist() == [0, 1, 2, 3, 4, 7, 8, 5, 6, 9, 10]


def test_sides_that_were_not_announced_are_refused():
    with pytest.raises(ValueError, match=r"sides other than \(16,\)"):
        PatchLayout.build(torch.full((1, 2, 2), 32), 16)
