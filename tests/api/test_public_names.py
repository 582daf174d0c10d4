"""Names that `motip` exports: resolvable, callable after any other import, loaded on first use."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import motip
from motip.errors import MotipError
from tests.helpers.small_dataset import write_checkpoint, write_curriculum
from tests.helpers.videos import write_video

ROOT = Path(__file__).resolve().parents[2]


def python(code: str, folder: Path = ROOT) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=folder, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


@pytest.mark.parametrize("name", motip.__all__)
def test_exported_name_resolves(name: str) -> None:
    assert getattr(motip, name) is not None and name in dir(motip)


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        motip.no_such_name  # noqa: B018


def test_importing_the_package_loads_no_engine() -> None:
    code = "import motip, sys; print([m for m in ('torch', 'ray', 'mlflow', 'cv2', 'pyarrow') if m in sys.modules])"
    assert python(code) == "[]"


def test_functions_are_not_hidden_by_packages() -> None:
    code = (
        "import motip.tracking.settings, motip.evaluation.scores, motip; "
        "print(callable(motip.track), callable(motip.evaluate), callable(motip.load))"
    )
    assert python(code) == "True True True"


def test_readme_example_tracks_a_video(tmp_path: Path, repo_root: Path) -> None:
    (example,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    write_curriculum(tmp_path / "curriculum.yaml", repo_root)
    write_checkpoint(tmp_path / "checkpoint_best.pth", tmp_path / "stage.yaml")
    write_video(tmp_path / "street.mp4")
    assert re.findall(r"^(\d+) \[", python(example, tmp_path), re.MULTILINE) == [str(number) for number in range(7)]


def test_evaluate_with_a_missing_checkpoint_is_an_error(tmp_path: Path, repo_root: Path) -> None:
    write_curriculum(tmp_path / "curriculum.yaml", repo_root)
    with pytest.raises(MotipError, match="weights file does not exist"):
        motip.evaluate(tmp_path / "none.pth", tmp_path / "curriculum.yaml", tmp_path)
