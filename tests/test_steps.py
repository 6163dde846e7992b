"""What a long run keeps between its starts: finished steps, for the very same inputs."""

import pytest

from tools.steps import Steps, fingerprint


class Work:
    """A step that counts how often it is done."""

    def __init__(self):
        self.done = 0

    def __call__(self):
        self.done += 1
        return {16: self.done, "shares": (0.5, 1.0)}


def test_a_finished_step_is_not_repeated(tmp_path):
    work = Work()
    first = Steps(tmp_path).run("name", "title", {"removed": 0.3}, work)
    again = Steps(tmp_path).run("name", "title", {"removed": 0.3}, work)
    assert first == again == {"16": 1, "shares": [0.5, 1.0]} and work.done == 1


@pytest.mark.parametrize(
    "common, inputs",
    [
        ({"data": "a"}, {"removed": 0.4}),
        ({"data": "b"}, {"removed": 0.3}),
        ({"data": "a"}, {"removed": 0.3, "more": 1}),
    ],
)
def test_other_inputs_repeat_it(tmp_path, common, inputs):
    work = Work()
    Steps(tmp_path, {"data": "a"}).run("name", "title", {"removed": 0.3}, work)
    assert Steps(tmp_path, common).run("name", "title", inputs, work)["16"] == 2


def test_an_interrupted_step_is_not_finished(tmp_path):
    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Steps(tmp_path).run("name", "title", {}, interrupted)
    assert not list(tmp_path.iterdir())


def test_a_fingerprint_is_of_names_and_content(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "one.py").write_text("1")
    (tmp_path / "a" / "notes.txt").write_text("1")
    before = fingerprint(tmp_path / "a", pattern="*.py")
    (tmp_path / "a" / "notes.txt").write_text("2")
    assert fingerprint(tmp_path / "a", pattern="*.py") == before != fingerprint(tmp_path / "a")
    (tmp_path / "a" / "one.py").write_text("2")
    changed = fingerprint(tmp_path / "a", pattern="*.py")
    (tmp_path / "a" / "one.py").rename(tmp_path / "a" / "two.py")
    assert len({before, changed, fingerprint(tmp_path / "a", pattern="*.py")}) == 3
    with pytest.raises(FileNotFoundError, match=r"nothing at .*missing"):
        fingerprint(tmp_path / "missing")
