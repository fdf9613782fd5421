"""csrc/examples/encoder.cpp: the demo's model without Python gives the answers of Python, and files
that are not right end it with a sentence."""

import json
import os
import re
import shutil
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accuracy import assert_accurate
from checkout import ROOT, build_script, need
from safetensors.torch import save_file
from torch import Tensor

import fastfusion as ff
from fastfusion.applications.vqa.model import CHECKPOINT, Checkpoint
from fastfusion.backends import library
from fastfusion.data import easy_vqa as data
from fastfusion.models.parts import to_float

need("setup.py", "csrc", "Makefile")
BUILD = build_script()
COMPILER = BUILD["find_compiler"]()
native = library.native
pytestmark = pytest.mark.skipif(
    native is None or COMPILER is None, reason="the compiled part is not built"
)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example with the package's kernels."""
    target = tmp_path_factory.mktemp("example") / "encoder"
    package = Path(ff.__file__).parent
    flags = ["-std=c++20", "-O1", "-Wall", "-Wextra", "-Werror", "-Icsrc"]
    link = [f"-L{package}", "-lfastfusion_cpu", f"-Wl,-rpath,{package}", "-o", str(target)]
    command = [*COMPILER, *flags, "csrc/examples/encoder.cpp", *link]
    subprocess.run(command, cwd=ROOT, check=True)
    return target


@pytest.fixture(scope="module")
def questions() -> dict[str, Tensor]:
    """Those about the first three pictures, of one to nine words."""
    split = data.load("test", 3)
    texts = Checkpoint.load().vocabulary.encode([*split.texts, "yes"])
    one_word = torch.tensor([[1], [len(split.texts)]])
    return {
        "images": split.images,
        "questions": texts,
        "image_index": torch.cat([split.image_index, one_word[0]]),
        "text_index": torch.cat([split.text_index, one_word[1]]),
    }


@pytest.fixture(scope="module")
def inputs(questions: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("inputs") / "questions.safetensors"
    save_file(questions, file)
    return file


def run(program: Path, *arguments: object, **environment: str) -> Any:
    return subprocess.run(
        [program, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=os.environ | environment,
    )


@torch.inference_mode()
def logits(questions: dict[str, Tensor], dtype: torch.dtype, backend: str | None) -> Tensor:
    model = Checkpoint.load().model
    assert model is not None
    images, texts = to_float(questions["images"]).to(dtype), questions["questions"]
    with ff.use_backend(backend):
        return model.to(dtype)(images, texts, questions["image_index"], questions["text_index"])


def check_answers(output: str, questions: dict[str, Tensor]) -> None:
    """Each logit as accurate as the plain formula's, each answer Python's."""
    lines = [line.split() for line in output.splitlines()]
    assert [int(line[0]) for line in lines] == list(range(len(questions["image_index"])))
    actual = torch.tensor([[float(number) for number in line[3:]] for line in lines])
    exact = logits(questions, torch.float64, "reference")
    assert_accurate(actual, exact, logits(questions, torch.float32, "reference"))
    best = logits(questions, torch.float32, None).argmax(dim=1).tolist()
    assert [int(line[1]) for line in lines] == best
    assert [line[2] for line in lines] == [Checkpoint.load().answers[number] for number in best]


class TestAnswers:
    @pytest.mark.parametrize("isa", native.isas(runnable=True) if native is not None else [])
    def test_are_those_of_python(
        self, program: Path, inputs: Path, questions: dict[str, Tensor], isa: str
    ) -> None:
        result = run(program, CHECKPOINT, inputs, 0, FASTFUSION_CPU_ISA=isa)
        assert (result.returncode, result.stderr) == (0, "")
        check_answers(result.stdout, questions)

    def test_time_is_the_last_line(self, program: Path, inputs: Path) -> None:
        result = run(program, CHECKPOINT, inputs, 3, FASTFUSION_CPU_ISA="scalar")
        last = result.stdout.splitlines()[-1]
        assert re.fullmatch(r"a question: \d+\.\d us \(median of 3, one thread, scalar\)", last), (
            last
        )

    def test_of_the_static_program(
        self, inputs: Path, questions: dict[str, Tensor], tmp_path: Path
    ) -> None:
        """`make example`, but at -O1, by which kernels for AVX-512 take 16 s and not 36."""
        probe = [*COMPILER, "-static", "-x", "c++", "-", "-o", os.devnull]
        if subprocess.run(probe, input="int main() {}", text=True, capture_output=True).returncode:
            pytest.skip("the compiler links no static programs here")
        if shutil.which("make") is None:
            pytest.skip("no make")
        outer = {name: os.environ[name] for name in os.environ if not name.startswith("MAKE")}
        makefile = (ROOT / "Makefile").read_text()
        flags = re.search(r"^SET_avx512 := -O3 (.*)$", makefile, re.MULTILINE)
        assert flags is not None
        variables = {
            "CXX": " ".join(COMPILER), "EXAMPLE": tmp_path, "SET_avx512": f"-O1 {flags[1]}"
        }  # fmt: skip
        command = ["make", "--silent", "example", *(f"{n}={v}" for n, v in variables.items())]
        made = subprocess.run(command, cwd=ROOT, env=outer, capture_output=True, text=True)
        assert made.returncode == 0, made.stderr
        result = run(tmp_path / "encoder", CHECKPOINT, inputs, 0)
        assert (result.returncode, result.stderr) == (0, "")
        check_answers(result.stdout, questions)

    def test_static_kernels_have_the_flags_of_the_package(self) -> None:
        makefile = (ROOT / "Makefile").read_text()
        common = re.search(r"^EXAMPLE_FLAGS := (.*\\\n.*)$", makefile, re.MULTILINE)
        assert common is not None
        flags = {flag for flag in BUILD["COMPILE_FLAGS"] if flag.startswith(("-f", "-std"))}
        assert flags - {"-fPIC"} <= set(common[1].split())
        for isa in ("avx2", "avx512"):
            mine = re.search(rf"^SET_{isa} := (.*)$", makefile, re.MULTILINE)
            wanted = {f for f in BUILD["ISA_FLAGS"]["x86_64"][isa].split() if f.startswith("-m")}
            assert mine is not None and wanted == set(mine[1].split()) - {"-O2", "-O3"}


Header = dict[str, Any]
Edit = Callable[[Header], Any]


def edited(file: Path, edit: Edit) -> bytes:
    """The file with another header: what `edit` made of it, or text that it returned."""
    content = file.read_bytes()
    end = 8 + struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8:end])
    text = edit(header)
    new = (text if isinstance(text, str) else json.dumps(header)).encode()
    return struct.pack("<Q", len(new)) + new + content[end:]


def setting(*path: str, to: Any) -> Edit:
    """Replaces one value of a header."""

    def edit(header: Header) -> None:
        for key in path[:-1]:
            header = header[key]
        header[path[-1]] = to

    return edit


def config(**sizes: Any) -> Edit:
    def edit(header: Header) -> None:
        metadata = header["__metadata__"]
        metadata["config"] = json.dumps(json.loads(metadata["config"]) | sizes)

    return edit


WEIGHT, BIAS = "model.transformer.output.weight", "model.transformer.output.bias"
TENSOR = '{"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}'
BAD_BYTES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda content: b"", "too short"),
    "cut off in the length": (lambda content: content[:5], "too short"),
    "cut off in the header": (lambda content: content[:200], r"200 bytes, and a header of \d+"),
    "cut off in the data": (lambda content: content[:-4], r"tensor '.*' ends at byte \d+"),
    "length too large": (lambda content: b"\xff" * 8 + content[8:], "header of 18446744073709"),
    "length too small": (lambda content: struct.pack("<Q", 40) + content[8:], "at byte"),
    "length of 0": (lambda content: bytes(8) + content[8:], "expected '{' at byte 0"),
}  # fmt: skip
BAD_HEADERS: dict[str, tuple[Edit, str]] = {
    "no tensor": (lambda header: header.pop(WEIGHT), f"has no tensor '{WEIGHT}'"),
    "no metadata": (lambda header: header.pop("__metadata__"), "has no 'format' in its metadata"),
    "another type": (
        setting(BIAS, "dtype", to="I32"), rf"'{BIAS}' is I32 \(13\), expected F32 \(13\)",
    ),
    "another shape": (
        setting(WEIGHT, "shape", to=[192, 13]), r"is F32 \(192, 13\), expected F32 \(13, 192\)",
    ),
    "another size": (setting(BIAS, "shape", to=[14]), r"has 52 bytes, but F32 \(14\) takes 56"),
    "a negative size": (setting(BIAS, "shape", to=[-13]), "negative size"),
    "a huge size": (setting(BIAS, "shape", to=[2**62, 2**62]), "too large"),
    "no offsets": (lambda header: header[BIAS].pop("data_offsets"), "has no data_offsets"),
    "turned offsets": (setting(BIAS, "data_offsets", to=[52, 0]), "has no data_offsets"),
    "offsets behind the end": (
        setting(BIAS, "data_offsets", to=[2**40, 2**40 + 52]), "the file is cut off",
    ),
    "a negative offset": (setting(BIAS, "data_offsets", to=[-52, 0]), "has no data_offsets"),
    "an offset of 65 bits": (setting(BIAS, "data_offsets", to=[0, 2**64]), "an integer of 64 bits"),
    "a fraction": (setting(BIAS, "data_offsets", to=[0.5, 52]), "an integer of 64 bits"),
    "not aligned": (setting(BIAS, "data_offsets", to=[2, 54]), f"'{BIAS}' is not aligned"),
    "two tensors of a name": (
        lambda header: f'{{"a": {TENSOR}, "a": {TENSOR}}}', "two tensors 'a'",
    ),
    "no JSON": (lambda header: "{'a': 1}", "expected '\"' at byte 1"),
    "no end": (lambda header: '{"a', "the text ends in a string"),
    "more behind the end": (lambda header: "{} {}", "expected the end at byte 3"),
    "deep": (lambda header: '{"a": {"b": ' + "[" * 100000, "too deep"),
    "half a pair": (lambda header: '{"\\ud800": 1}', "half a surrogate pair"),
    "another format": (setting("__metadata__", "format", to="pt"), "is of another format"),
    "no heads": (config(num_heads=0), "a size below 1"),
    "5 heads": (config(num_heads=5), "no multiple of num_heads"),
    "another width": (config(width=128), r"model.stem.0.*expected F32 \(32"),
    "more layers": (config(num_layers=3), r"has no tensor '.*layers\.2.*'"),
    "fewer answers": (setting("__metadata__", "answers", to='["no"]'), "another number of answers"),
}  # fmt: skip
BAD_INPUTS: dict[str, tuple[Callable[[dict[str, Tensor]], dict[str, Tensor]], str]] = {
    "no pictures": (
        lambda t: {name: t[name] for name in t if name != "images"}, "no tensor 'images'",
    ),
    "floats": (lambda t: t | {"images": t["images"].float()}, "is F32 .*, expected U8"),
    "small pictures": (
        lambda t: t | {"images": t["images"][:, :, :32, :32].contiguous()},
        r"\(3, 3, 32, 32\), expected U8 \(any, 3, 64, 64\)",
    ),
    "an unknown word": (
        lambda t: t | {"questions": t["questions"] + 27}, "questions has the number .*0 to 27",
    ),
    "long questions": (lambda t: t | {"questions": t["questions"].repeat(1, 2)}, "have 18 words"),
    "no such picture": (lambda t: t | {"image_index": t["image_index"] + 1}, "number 3"),
    "a text before the first": (lambda t: t | {"text_index": t["text_index"] - 500}, "number -"),
    "fewer texts": (
        lambda t: t | {"text_index": t["text_index"][:2]}, r"I64 \(2\), expected I64 \(28\)",
    ),
}  # fmt: skip


class TestBadFiles:
    def fails(self, result: Any, message: str) -> None:
        assert (result.returncode, result.stdout) == (1, "")
        assert re.fullmatch(rf"encoder: [^\n]*{message}[^\n]*\n", result.stderr), result.stderr

    @pytest.mark.parametrize("what", BAD_BYTES)
    def test_of_other_bytes(self, program: Path, inputs: Path, tmp_path: Path, what: str) -> None:
        change, message = BAD_BYTES[what]
        for good in (CHECKPOINT, inputs):
            bad = tmp_path / "bad"
            bad.write_bytes(change(good.read_bytes()))
            files = (bad, inputs) if good == CHECKPOINT else (CHECKPOINT, bad)
            self.fails(run(program, *files), message)

    @pytest.mark.parametrize("what", BAD_HEADERS)
    def test_of_another_header(
        self, program: Path, inputs: Path, tmp_path: Path, what: str
    ) -> None:
        edit, message = BAD_HEADERS[what]
        bad = tmp_path / "bad"
        bad.write_bytes(edited(CHECKPOINT, edit))
        self.fails(run(program, bad, inputs), message)

    @pytest.mark.parametrize("what", BAD_INPUTS)
    def test_of_other_inputs(
        self, program: Path, questions: dict[str, Tensor], tmp_path: Path, what: str
    ) -> None:
        change, message = BAD_INPUTS[what]
        save_file(change(questions), tmp_path / "bad")
        self.fails(run(program, CHECKPOINT, tmp_path / "bad"), message)

    def test_that_are_none(self, program: Path, inputs: Path, tmp_path: Path) -> None:
        self.fails(run(program, tmp_path / "missing", inputs), "missing: No such file")
        self.fails(run(program, tmp_path, inputs), "is not a file")

    @pytest.mark.parametrize("arguments", [(), ("a",), ("a", "b", "-1"), ("a", "b", "x")])
    def test_wrong_arguments(self, program: Path, arguments: tuple[str, ...]) -> None:
        result = run(program, *arguments)
        assert result.returncode == 2 and result.stderr.startswith("usage:")

    def test_names_in_any_script_are_read(
        self, program: Path, inputs: Path, tmp_path: Path
    ) -> None:
        """Escapes of JSON: of answers that are written in the metadata, a text within a text."""
        names = ["é", "ß", "漢", "😀", '"', "\\", "/", "\t", "a", "b", "c", "d", "e"]
        file = tmp_path / "renamed"
        answers = json.dumps(names)
        file.write_bytes(edited(CHECKPOINT, setting("__metadata__", "answers", to=answers)))
        renamed = run(program, file, inputs, 0)
        assert renamed.returncode == 0
        plain = run(program, CHECKPOINT, inputs, 0).stdout.splitlines()
        for line, before in zip(renamed.stdout.splitlines(), plain, strict=True):
            number, answer, _, rest = before.split(" ", 3)
            assert line == f"{number} {answer} {names[int(answer)]} {rest}"
