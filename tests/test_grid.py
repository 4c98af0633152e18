"""XYZ plots: every picture in its place, labels that stay in theirs, and axes as they are typed."""

from dataclasses import fields

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from ldm.errors import UsageError
from ldm.grid import axes, layout, plot
from ldm.request import Request

COLOURS = ["red", "lime", "blue", "cyan", "magenta", "yellow"]
LONG = "a very long prompt, with commas, that goes on and on " * 9 + "Donaudampfschifffahrtsgesellschaftskapitaen" * 5
HOSTILE = ["🦉 \u202e鸟", "a\nb\tc", "\x00\x1b[31m", "\ud800", "x" * 100_000, "", "   ", "e\u0301\u0301"]


def coloured(width: int, height: int) -> list[Image.Image]:
    return [Image.new("RGB", (width, height), colour) for colour in COLOURS]


def box(sheet: Image.Image, colour: str) -> tuple[int, int, int, int]:
    """Left, upper, right, lower edge of all pixels of a colour, which are nothing but one full rectangle."""
    of_it = (np.asarray(sheet) == Image.new("RGB", (1, 1), colour).getpixel((0, 0))).all(axis=2)
    ys, xs = np.nonzero(of_it)
    left, upper, right, lower = xs.min(), ys.min(), xs.max() + 1, ys.max() + 1
    assert of_it[upper:lower, left:right].all() and of_it.sum() == (right - left) * (lower - upper)
    return int(left), int(upper), int(right), int(lower)


def ink(sheet: Image.Image) -> NDArray[np.bool_]:
    """Where text is: pixels in shades of grey below white."""
    pixels = np.asarray(sheet).astype(int)
    return (pixels.max(axis=2) == pixels.min(axis=2)) & (pixels[..., 0] < 255)


def test_pictures_stand_row_by_row_and_small_ones_are_enlarged():
    sheet = plot(coloured(16, 12), ["a", "b", "c"], ["x", "y"], "owls")
    boxes = [box(sheet, colour) for colour in COLOURS]
    assert {(right - left, lower - upper) for left, upper, right, lower in boxes} == {(128, 96)}
    assert boxes[0][1] == boxes[1][1] == boxes[2][1] and boxes[0][3] < boxes[3][1] == boxes[4][1] == boxes[5][1]
    for i in range(3):
        assert boxes[i][0] == boxes[i + 3][0]
        assert i == 0 or boxes[i - 1][2] < boxes[i][0]
    assert sheet.mode == "RGB" and sheet.width > boxes[2][2] and sheet.height > boxes[5][3]


def test_each_pixel_becomes_a_square_and_large_pictures_stay_as_they_are():
    small = Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 10, 3), dtype=np.uint8))
    sheet = plot([small], ["a"], ["b"])
    expected = small.resize((70, 140), Image.Resampling.NEAREST)  # 7 = the least factor that reaches 128
    places = np.argwhere((np.asarray(sheet) == np.asarray(expected)[0, 0]).all(axis=2))
    assert any(sheet.crop((x, y, x + 70, y + 140)).tobytes() == expected.tobytes() for y, x in places)
    left, upper, right, lower = box(plot([Image.new("RGB", (150, 200), "red")], ["a"], ["b"]), "red")
    assert (right - left, lower - upper) == (150, 200)


def test_pictures_of_different_sizes_do_not_touch():
    sizes = [(16, 16), (200, 150), (64, 300), (128, 128), (5, 9), (300, 20)]
    cells = [Image.new("RGB", size, colour) for size, colour in zip(sizes, COLOURS, strict=True)]
    boxes = [box(plot(cells, ["a", "b"], ["x", "y", "z"]), colour) for colour in COLOURS]
    for i, (left, upper, right, lower) in enumerate(boxes):
        for other in boxes[i + 1 :]:
            assert right <= other[0] or other[2] <= left or lower <= other[1] or other[3] <= upper


def test_white_shows_through_what_is_transparent():
    sheet = plot([Image.new("RGBA", (8, 8), (255, 0, 0, 0))], [""], [""])
    assert (np.asarray(sheet) == 255).all()


def test_labels_stay_at_their_column_and_row():
    """A label's ink is above its own column or left of its own row, wherever the others have none."""
    for i in range(3):
        sheet = plot(coloured(16, 16), [LONG if i == j else "" for j in range(3)], ["", ""])
        left, upper, right, _ = box(sheet, COLOURS[i])
        ys, xs = np.nonzero(ink(sheet))
        assert len(ys) and left <= xs.min() and xs.max() < right and ys.max() < upper
    for i in range(2):
        sheet = plot(coloured(16, 16), ["", "", ""], [LONG if i == j else "" for j in range(2)])
        left, upper, _, lower = box(sheet, COLOURS[3 * i])
        ys, xs = np.nonzero(ink(sheet))
        assert len(ys) and xs.max() < left and upper <= ys.min() and ys.max() < lower


def test_the_title_is_above_everything_and_wrapped():
    plain, titled = (plot(coloured(16, 16), ["a", "b", "c"], ["x", "y"], title) for title in ("", LONG))
    assert titled.width == plain.width and titled.height > plain.height + 40
    added = titled.height - plain.height
    assert titled.crop((0, added + 16, *titled.size)).tobytes() == plain.crop((0, 16, *plain.size)).tobytes()
    assert ink(titled)[:added].any() and not ink(titled)[:, -16:].any()


@pytest.mark.parametrize("label", HOSTILE)
def test_any_text_can_be_a_label(label: str):
    sheet = plot(coloured(16, 16), [label, "b", "c"], [label, "y"], label)
    assert box(sheet, "red")[2] - box(sheet, "red")[0] == 128 and sheet.height < 1000


def test_letters_that_the_font_lacks_are_not_left_out():
    empty, owl = (np.asarray(plot(coloured(9, 9)[:1], [label], [""])) for label in ("", "🦉"))
    assert owl.shape[0] > empty.shape[0] and ink(Image.fromarray(owl)).any()
    accented, plain = (plot(coloured(9, 9)[:1], [label], [""]).tobytes() for label in ("Café Ölü", "Cafe Olu"))
    assert accented == plain


@pytest.mark.parametrize(("columns", "rows"), [(["a"], ["b"]), ([], ["a"]), ([], []), (["a"] * 7, ["a"])])
def test_a_plot_has_one_picture_for_each_place(columns: list[str], rows: list[str]):
    with pytest.raises(UsageError, match=f"6 pictures for {len(columns)} columns and {len(rows)} rows"):
        plot(coloured(9, 9), columns, rows)
    with pytest.raises(UsageError, match="0 pictures"):
        plot([], [], [])


def test_a_sheet_too_large_to_open_is_refused_before_it_is_made():
    with pytest.raises(UsageError, match=r"100 columns and 100 rows has \d+x\d+ pixels"):
        layout((512, 512), ["a"] * 100, ["b"] * 100)
    assert layout((512, 512), ["a"] * 20, ["b"] * 20).size[0] > 20 * 512


AXES = {
    "steps=5,10,20": ("num_inference_steps", [5, 10, 20]),
    "guidance=1..7:2": ("guidance_scale", [1.0, 3.0, 5.0, 7.0]),
    "guidance = 0..1:0.1": ("guidance_scale", [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]),
    "--guidance=1, 2.5,.5": ("guidance_scale", [1.0, 2.5, 0.5]),
    "seed=1..4": ("seed", [1, 2, 3, 4]),
    "seed=4..1,9": ("seed", [4, 3, 2, 1, 9]),
    "seed=9223372036854765807": ("seed", [9223372036854765807]),
    "steps=10..1:4": ("num_inference_steps", [10, 6, 2]),
    "num_inference_steps=3": ("num_inference_steps", [3]),
    "guidance-rescale=0,1": ("guidance_rescale", [0.0, 1.0]),
    "variation_seed=3,4": ("variation_seed", [3, 4]),
    "variation_strength=0..1:.5": ("variation_strength", [0.0, 0.5, 1.0]),
    "scheduler=ddim,euler": ("scheduler", ["ddim", "euler"]),
    "prompt=a taco|an owl, at night": ("prompt", ["a taco", "an owl, at night"]),
    "prompt=a=b|c": ("prompt", ["a=b", "c"]),
    "negative=|red, blue": ("negative_prompt", ["", "red, blue"]),
}


@pytest.mark.parametrize("text", AXES)
def test_axes_are_read(text: str):
    name, values = axes(text)
    assert (name, values) == AXES[text]
    assert [type(value) for value in values] == [type(value) for value in AXES[text][1]]


def test_every_field_that_matters_to_one_picture_can_be_an_axis():
    for field in fields(Request):
        if field.name in ("output_type", "num_images_per_prompt") or field.type is bool:
            with pytest.raises(UsageError, match="unknown axis"):
                axes(f"{field.name}=1")
        else:
            for name in filter(None, (field.name, field.name.replace("_", "-"), field.metadata["flag"])):
                named = {"profile": "a1111", "noise_source": "gpu", "seamless": "x"}
                value = named.get(field.name, "0.5" if field.name.endswith(("_start", "_end")) else "1")
                assert axes(f"{name}={value}") == (field.name, [value if "str" in str(field.type) else float(value)])
    boxes = ["box:0,0,8,8", "ellipse:0,0,8,8"]
    assert axes(f"mask={'|'.join(boxes)}") == ("mask_image", boxes)


REFUSED = {
    "stepz=5": "unknown axis 'stepz'; did you mean 'steps'",
    "n=1,2": "unknown axis",
    "": "unknown axis ''",
    "steps": "has no values; write for example",
    "steps=": "has no values",
    "steps=5,,6": "num_inference_steps is ''; it must be a number",
    "steps=five": "num_inference_steps is 'five'",
    "steps=5.5": "5.5; it must be a whole number from 1 to 1000",
    "steps=1..2:0.5": "must be a whole number",
    "steps=0": "num_inference_steps is 0",
    "steps=1..5:0": "the step of a range must be above 0",
    "steps=1..5:-1": "the step of a range must be above 0",
    "steps=1..": "must be a number, or a range",
    "steps=nan": "must be a number",
    "steps=\u0663": "must be a number",
    "guidance=-1..1": "guidance_scale is -1.0; it must be a number from 0 to 1000",
    "guidance=1e9": "must be a number",
    "seed=1..401": "more than 400 values",
    "seed=1..99999999999999999999": "more than 400 values",
    "guidance=0..1:0.00000000000000000001": "more than 400 values",
    "seed=1..300,1..300": "has 600 values; give at most 400",
    "prompt=a| |b": "has an empty value",
    "scheduler=ddim,,euler": "has an empty value",
}


@pytest.mark.parametrize("text", REFUSED)
def test_what_is_no_axis_is_refused(text: str):
    with pytest.raises(UsageError) as refusal:
        axes(text)
    assert REFUSED[text] in str(refusal.value)
    assert len(axes("seed=1..400")[1]) == 400
