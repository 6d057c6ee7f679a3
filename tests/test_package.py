"""The package as a stranger meets it: installed from a wheel, imported in a clean process, without IPython or
nbdev.
"""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MODULES = sorted(
    ".".join(f.relative_to(ROOT / "flextok_edu").with_suffix("").parts)
    for f in (ROOT / "flextok_edu").rglob("*.py")
    if not f.stem.startswith("_")
)
LESSONS = sorted((ROOT / "nbs").glob("[0-9]*.ipynb"))
SHELVES = ("engine", "data", "systems", "evaluation", "io", "apps")
REFERENCE = [f for shelf in SHELVES for f in sorted((ROOT / "nbs" / shelf).glob("*.ipynb"))]

# Refuses what only notebooks and developers have; then uses functions of every module.
CLEAN = """
import builtins, sys
real = builtins.__import__
ABSENT = 'IPython', 'nbdev', 'fastcore', 'execnb', 'vector_quantize_pytorch', 'diffusers', 'nbformat'
def guarded(name, *a, **k):
    if name.split('.')[0] in ABSENT:
        raise ImportError('not at run time: ' + name)
    return real(name, *a, **k)
builtins.__import__ = guarded
import importlib, tempfile
for module in MODULES: importlib.import_module('flextok_edu.' + module)
from flextok_edu.apps.run import run
from flextok_edu.apps.run_config import RunConfig
with tempfile.TemporaryDirectory() as folder:
    small = dict(steps=3, train_images=60, images=12)
    report = run(RunConfig(out=folder + '/run', device='cpu', compile='off', **small))
    assert len(report.rows) == 14, report.rows
print('fine')
"""


def clean_process(code: str, path: Path, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [
            sys.executable,
            "-I",
            "-c",
            f"import sys; sys.path.insert(0, {str(path)!r}); MODULES = {MODULES!r}\n" + code,
        ],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "TQDM_DISABLE": "1", "MPLBACKEND": "Agg", **env},
        cwd="/" if os.name == "posix" else None,
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    result = subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--outdir", str(folder), str(ROOT)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    (found,) = folder.glob("*.whl")
    return found


def test_wheel_works_when_installed(wheel, tmp_path):
    """The wheel alone, not the checkout, runs the whole pipeline."""
    zipfile.ZipFile(wheel).extractall(tmp_path)
    result = clean_process(
        "import flextok_edu; assert flextok_edu.__file__.startswith(" + repr(str(tmp_path)) + ")\n" + CLEAN,
        tmp_path,
    )
    assert result.returncode == 0 and result.stdout.strip().endswith("fine"), (
        result.stdout[-1500:],
        result.stderr[-3000:],
    )


def test_wheel_contents(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {f"flextok_edu/{m.replace('.', '/')}.py" for m in MODULES} <= set(names)
    assert not [n for n in names if n.startswith(("tests/", "nbs/", "tools/"))]
    metadata = zipfile.ZipFile(wheel).read(next(n for n in names if n.endswith("METADATA"))).decode()
    needs = [
        line.split(": ", 1)[1]
        for line in metadata.splitlines()
        if line.startswith("Requires-Dist") and "extra ==" not in line
    ]
    assert not [n for n in needs if n.startswith(("nbdev", "fastcore", "jupyter"))], (
        "development tools are no runtime requirements"
    )
    for extra in ("text", "metrics", "fidelity", "data", "app", "dev"):
        assert f"Provides-Extra: {extra}" in metadata
    entry = zipfile.ZipFile(wheel).read(next(n for n in names if n.endswith("entry_points.txt"))).decode()
    for command in (
        "flextok_run = flextok_edu.apps.run:run_main",
        "flextok_info = flextok_edu.apps.cost:info_main",
        "flextok_bench = flextok_edu.apps.bench:bench_main",
        "flextok_compare = flextok_edu.apps.measure:compare_main",
    ):
        assert command in entry


def test_without_a_compiler(tmp_path):
    """No C++ compiler: one line of notice, and everything runs eagerly."""
    code = (
        "from flextok_edu.engine.compiler import compiler_works\nprint(compiler_works('cpu'), "
        "compiler_works('cpu'))"
    )
    result = clean_process(
        code, ROOT, CXX=str(tmp_path / "none"), PATH="/nonexistent", TORCHINDUCTOR_CACHE_DIR=str(tmp_path)
    )
    assert result.returncode == 0, result.stderr[-2000:]
    lines = [line for line in result.stdout.splitlines() if line.strip()]
    assert lines[-1] == "False False" and sum("running eagerly" in line for line in lines) == 1, lines


def test_commands_start_without_what_they_may_not_need():
    """A command's --help should not take as long as importing all of torchmetrics (more than PyTorch itself),
    torchvision and matplotlib.
    """
    code = (
        "import sys\n"
        + "".join(f"import flextok_edu.{m}\n" for m in MODULES)
        + "print([m for m in ('torchmetrics', 'torchvision', 'torch._dynamo', 'matplotlib.pyplot', "
        "'scipy', 'accelerate', 'datasets') if m in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=400, cwd=ROOT
    )
    assert result.returncode == 0 and result.stdout.strip() == "[]", (result.stdout, result.stderr[-1000:])


def test_command_line_help():
    result = subprocess.run(
        [sys.executable, "-m", "flextok_edu.pipeline", "--help"],
        capture_output=True,
        text=True,
        timeout=400,
        cwd=ROOT,
    )
    assert result.returncode == 0
    for option in ("--data", "--preset", "--out", "--device", "--minutes", "--seed"):
        assert option in result.stdout
    refused = subprocess.run(
        [sys.executable, "-m", "flextok_edu.pipeline", "--preset", "mikro"],
        capture_output=True,
        text=True,
        timeout=400,
        cwd=ROOT,
    )
    assert (
        refused.returncode == 1
        and "choose one of micro" in refused.stderr
        and "Traceback" not in refused.stderr
    )


@pytest.mark.parametrize("notebook", [*LESSONS, *REFERENCE], ids=lambda f: f.stem)
def test_notebook_is_readable(notebook):
    """Title cell alone, outputs committed and free of errors, no long stretch of code without a word."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    title = "".join(cells[0]["source"]).strip().splitlines()
    assert (
        cells[0]["cell_type"] == "markdown"
        and len(title) == 2
        and title[0].startswith("# ")
        and title[1].startswith("> ")
    )
    code = [c for c in cells if c["cell_type"] == "code"]
    assert notebook not in LESSONS or any(c["outputs"] for c in code), "outputs are committed"
    assert notebook.stat().st_size < 1_500_000
    assert not [o for c in code for o in c["outputs"] if o["output_type"] == "error"]
    assert not [c for c in code if "eval: false" in "".join(c["source"]).replace("eval:false", "eval: false")]
    run = longest = 0
    for c in cells:
        run = run + 1 if c["cell_type"] == "code" and "#| hide" not in "".join(c["source"]) else 0
        longest = max(longest, run)
    assert longest <= 4
