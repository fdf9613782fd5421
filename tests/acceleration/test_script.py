"""python -m fastfusion accelerate SCRIPT.py."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

from fastfusion.__main__ import main
from fastfusion.acceleration.script import run

MODEL = """
import sys
import torch
from torch import nn

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.head = nn.Linear(64, 256)

    def forward(self, x, scale=1.0):
        return self.head(self.encoder(x)) * scale

torch.manual_seed(0)
model, x = Model(), torch.randn(1, 20, 64)
"""
CALL = "with torch.no_grad():\n    y = model.eval()(x)\n"


@pytest.fixture(autouse=True)
def _process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a script changes in this process is as before, after it."""
    monkeypatch.setattr(sys, "argv", [*sys.argv])
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setitem(sys.modules, "__main__", sys.modules["__main__"])
    call = nn.Module.__call__
    yield
    assert nn.Module.__call__ is call


def ran(tmp_path: Path, text: str, *arguments: str, **options: bool | str) -> ModuleType:
    path = tmp_path / "script.py"
    path.write_text(MODEL + text)
    assert run(path, arguments, **options) == 0  # type: ignore[arg-type]
    return sys.modules["__main__"]


def test_a_process_as_python_runs_it(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import atexit, os, pickle\n" + MODEL + CALL + "def f(): pass\n"
        "print(sys.argv, __name__, __file__, __spec__, __package__, sys.path[0])\n"
        "print(pickle.loads(pickle.dumps(f)) is f, round(float(y.abs().sum()), 3), x.shape)\n"
        "atexit.register(lambda: print('and', sys.modules['__main__'].f is f))\n"
        "if '--weights' in sys.argv: sys.exit(7)\n"
        "raise KeyError('no such key')\n"
    )
    for arguments in (["--weights", "a b"], ["--help"]):
        plain, accelerated = (
            subprocess.run(
                [sys.executable, *before, "script.py", *arguments],
                capture_output=True,
                text=True,
                cwd=tmp_path,
            )
            for before in ([], ["-m", "fastfusion", "accelerate"])
        )
        assert accelerated.stdout == plain.stdout != ""
        assert accelerated.returncode == plain.returncode in (1, 7)
        assert accelerated.stderr.startswith(plain.stderr), "the traceback has no frame of ours"
        report = accelerated.stderr.removeprefix(plain.stderr)
        assert report.startswith("fastfusion accelerate: Model\nlayers ")
        assert "fastfusion.nn.TransformerEncoderLayer" in report


def test_models_in_eval_mode_at_their_first_call(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "model(x)\nbefore = type(model.head)\n" + CALL + CALL
    main_module = ran(tmp_path, text)
    assert main_module.before is nn.Linear is not type(main_module.model.head)
    assert capsys.readouterr().err.count("fastfusion accelerate: Model") == 1
    ran(tmp_path, "model(x)\n")
    assert "no model with layers that could be faster was called" in capsys.readouterr().err


def test_a_model_answers_for_parts_that_were_called_before(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ran(tmp_path, "model.eval().encoder(x)\nnn.ReLU().eval()(x)\n" + CALL)
    printed = capsys.readouterr().err
    assert printed.count("fastfusion accelerate: ") == 1 and "Model" in printed


def test_compiled_models(tmp_path: Path) -> None:
    text = "model = torch.compile(model, backend='eager', fullgraph=True)\n" + CALL
    main_module = ran(tmp_path, text)
    assert type(main_module.model._orig_mod.head) is not nn.Linear
    assert main_module.y.shape == (1, 20, 256)


@pytest.mark.parametrize("call", ["model(x)", "model(x, scale=2.0)", "model(x=x)"])
def test_check_and_weights(call: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = f"model.eval()\nwith torch.no_grad():\n    y = {call}\n"
    ran(tmp_path, text, weights="int8", check=True)
    printed = capsys.readouterr().err
    assert "weights narrower" in printed and "largest difference of outputs" in printed


def test_what_cannot_be_accelerated_runs_and_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "model = torch.fx.symbolic_trace(nn.Sequential(nn.Linear(64, 256)))\n" + CALL
    assert ran(tmp_path, text).y.shape == (1, 20, 256)
    assert (
        "left as it was: model is a Sequential: its layers were traced" in capsys.readouterr().err
    )


def test_threads_have_models_of_their_own(tmp_path: Path) -> None:
    text = """
import threading
models = [Model().eval() for _ in range(4)]
def work(model):
    with torch.no_grad():
        for _ in range(3):
            model(x)
threads = [threading.Thread(target=work, args=(each,)) for each in models]
[t.start() for t in threads]
[t.join() for t in threads]
"""
    main_module = ran(tmp_path, text)
    assert not any(type(each.head) is nn.Linear for each in main_module.models)


def test_the_same_numbers_as_without(tmp_path: Path) -> None:
    main_module = ran(tmp_path, CALL)
    namespace: dict[str, torch.Tensor] = {}
    exec(MODEL + CALL, namespace)
    torch.testing.assert_close(main_module.y, namespace["y"], rtol=1e-5, atol=1e-5)


def test_usage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["accelerate", str(tmp_path / "none.py")]) == 2
    assert "there is no file" in capsys.readouterr().err
    with pytest.raises(SystemExit) as exit_:
        main(["accelerate", "--weights", "int4", "x.py"])
    assert exit_.value.code == 2
    broken = tmp_path / "broken.py"
    broken.write_text("1 +\n")
    with pytest.raises(SyntaxError):
        run(broken, [])
