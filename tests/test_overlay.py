import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from annotation.overlay import EMPTY, NONE, OVERLAYS, Overlay, draw_text, font_size

CLASSES = ["BodyWeightSquats", "JumpRope", "YoYo", "Surfing"]


def row_of(label, probability=0.8):
    row = np.full(len(CLASSES), (1 - probability) / (len(CLASSES) - 1))
    row[label] = probability
    return row


def gray(height, width):
    return np.full((height, width, 3), 180, np.uint8)


@settings(deadline=None)
@given(
    height=st.integers(2, 400),
    width=st.integers(2, 400),
    total=st.integers(0, 30),
    style=st.sampled_from(OVERLAYS),
)
def test_frames_of_any_size_can_be_drawn_on(height, width, total, style):
    """Also where a file states fewer frames than it has."""
    overlay = Overlay(CLASSES, total, style)
    shapes = {overlay.draw(gray(height, width), row_of(number % 3), number % 3).shape for number in range(5)}
    (shape,) = shapes
    assert shape[1:] == (width, 3)
    if style == "full":
        assert shape[0] > height
        assert shape[0] % 2 == 0, "H.264 wants even sizes"
    else:
        assert shape[0] == height


@pytest.mark.parametrize("size", [(240, 320), (1080, 1920), (1280, 720)])
def test_the_timeline_has_the_color_of_each_action_where_it_was(size):
    overlay = Overlay(CLASSES, 40)
    for number in range(30):
        frame = overlay.draw(gray(*size), row_of(number // 10), number // 10)
    line = frame[size[0] + 1]
    for number, label in ((2, 0), (15, 1), (27, 2)):
        assert tuple(line[number * size[1] // 40]) == overlay.color(label)
    assert tuple(line[35 * size[1] // 40]) == EMPTY, "not shown yet"
    assert len({overlay.color(label) for label in range(3)}) == 3
    legend = frame[size[0] + 12 :].reshape(-1, 3)
    assert (legend == overlay.color(0)).all(1).any(), "the legend"


def test_bars_are_as_long_as_the_probability():
    lengths = []
    for probability in (0.4, 0.8):
        frame = Overlay(CLASSES, 0).draw(gray(240, 320), row_of(1, probability), 1)
        lengths.append((frame[:60] == Overlay(CLASSES, 0).color(1)).all(2).sum(1).max())
    assert lengths[1] == pytest.approx(2 * lengths[0], rel=0.1)


def test_without_an_end_the_timeline_moves_on():
    overlay = Overlay(CLASSES, 0)
    for label in [0] * 400 + [1] * 100:
        frame = overlay.draw(gray(240, 320), row_of(label), label)
    assert tuple(frame[241][200]) == overlay.color(0)
    assert tuple(frame[241][240]) == overlay.color(1)


@pytest.mark.parametrize("style", OVERLAYS)
def test_the_image_stays_but_for_the_plate_and_a_note_in_the_lower_right_corner(style):
    for note in ("", "25.0 frames/s, 31 ms"):
        frame = Overlay(CLASSES, 10, style).draw(gray(240, 320), row_of(0), 0, note)
        assert (frame[5:20, 8:120] < 90).any()
        assert (frame[120:200] == 180).all()
        assert (frame[200:240, :150] == 180).all()
        assert (frame[215:230, 200:310] < 60).any() == bool(note)


def test_no_action_has_no_bar_and_stands_in_the_timeline():
    overlay = Overlay(CLASSES, 10)
    assert overlay.color(NONE) == EMPTY
    frame = overlay.draw(gray(240, 320), row_of(2, 0.4), NONE)
    assert (frame[5:20, 8:120] > 200).any(), "its name"
    assert overlay.color(1) == Overlay(CLASSES, 0).color(3), "it takes no color"


def test_the_label_stands_first_though_another_is_more_probable():
    rows = row_of(0), row_of(1, 0.2 / 3)
    assert np.array_equal(*(Overlay(CLASSES, 0, "minimal").draw(gray(240, 320), row, 1) for row in rows))


SCRIPTS = {
    "Cyrillic": "Прыжок",
    "Greek": "Άλμα",
    "Latin": "Élan à pied",
    "Arabic": "قفز على الحبل",
    "Chinese": "跳跃",
    "Japanese": "ジャンプする",
    "Korean": "점프하기",
    "Devanagari": "रस्सी कूदना",
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_names_of_every_script_are_readable(script, capfd):
    name = SCRIPTS[script]
    drawn = draw_text(name, 20, (255, 255, 255), 300)
    if "no font here" in capfd.readouterr().err:
        pytest.skip(f"no font for {script} on this machine; fonts-noto-core and fonts-wqy-zenhei have them")
    boxes = draw_text("\U0010fffd" * len(name), 20, (255, 255, 255), 300)
    assert drawn.std() > 10
    assert drawn.shape != boxes.shape or (drawn != boxes).any()
    letters = {letter: draw_text(letter, 20, (255, 255, 255), 300) for letter in name if letter.isalpha()}
    pictures = {(picture.shape, picture.tobytes()) for picture in letters.values()}
    assert len(pictures) == len(letters), "boxes would be all alike"


def test_a_letter_that_no_font_has_is_told_once(capfd):
    for text in ("jump \U0010fffc", "run \U0010fffc", "jump \U0010fffc 70 %"):
        draw_text(text, 20, (255, 255, 255), 300)
    (line,) = capfd.readouterr().err.splitlines()
    assert "no font here has the letter" in line
    assert "fonts-noto" in line


def test_long_labels_fit_into_small_frames():
    assert draw_text("BodyWeightSquats 100 %", font_size(48, 64), (255, 255, 255), 50).shape[1] <= 50
    large = draw_text("BodyWeightSquats 100 %", font_size(2160, 3840), (255, 255, 255), 3000)
    assert 100 < large.shape[0] < 400
