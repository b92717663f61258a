"""The shape of the tree: who may import whom, how long files and functions may be, what importing may do."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kvjax.codec import CODECS
from kvjax.selection import SELECTIONS
from kvjax.task import TASKS
from models.config import FAMILIES

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("kvjax", "kernels_pallas", "models", "configs")
SOURCES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
NAMES = [str(path.relative_to(ROOT)) for path in SOURCES]

PROGRAMS = {
    "kvjax.bench",
    "kvjax.bench_decode",
    "kvjax.calibrate",
    "kvjax.comparison",
    "kvjax.decode",
    "kvjax.decoder",
    "kvjax.evaluate",
    "kvjax.train",
    "kvjax.tune",
}
FOUNDATION = {
    "kvjax.axes",
    "kvjax.errors",
    "kvjax.folder",
    "kvjax.model_shape",
    "kvjax.registry",
    "kvjax.rope",
    "kvjax.sharding",
}
STATE = {
    "kvjax.attention",
    "kvjax.cache",
    "kvjax.codec",
    "kvjax.empty",
    "kvjax.filling",
    "kvjax.grammar",
    "kvjax.policy",
    "kvjax.rounds",
    "kvjax.selection",
    "kvjax.stages",
    "kvjax.statistics",
}
EVICTION = {
    "kvjax._kernels",
    "kvjax.cache",
    "kvjax.compaction",
    "kvjax.eviction",
    "kvjax.evidence",
    "kvjax.keeping",
    "kvjax.pages",
    "kvjax.policy",
    "kvjax.selection",
    "kvjax.stages",
}
MODELS_SEE = {"kvjax.attention", "kvjax.cache", "kvjax.causal", "kvjax.foresight", "kvjax.statistics"}

MAY_IMPORT = {
    # module or package: what of ours it may import, itself apart
    "kernels_pallas": set(),
    "kvjax._kernels": {"kernels_pallas"},
    "kvjax.axes": set(),
    "kvjax.errors": set(),
    "kvjax.registry": {"kvjax.errors"},
    "kvjax.sharding": {"kvjax._kernels", "kvjax.errors"},
    "kvjax.rope": set(),
    "kvjax.model_shape": {"kvjax.rope"},
    "kvjax.folder": {"kvjax.errors"},
    "kvjax.stages": {"kvjax._kernels", "kvjax.errors", "kvjax.model_shape"},
    "kvjax.codec": FOUNDATION | {"kvjax._kernels", "kvjax.stages"},
    "kvjax.codecs": {"kvjax.codec", "kvjax.errors", "kvjax.folder", "kvjax.stages"},
    "kvjax.selection": FOUNDATION | {"kvjax._kernels", "kvjax.stages"},
    "kvjax.scoring": {"kvjax._kernels", "kvjax.errors", "kvjax.selection"},
    "kvjax.selections": {
        "kvjax._kernels",
        "kvjax.errors",
        "kvjax.folder",
        "kvjax.rope",
        "kvjax.scoring",
        "kvjax.selection",
        "kvjax.stages",
        "kvjax.torch_file",
    },
    "kvjax.policy": {"kvjax.codec", "kvjax.errors", "kvjax.model_shape", "kvjax.selection"},
    "kvjax.terms": {"kvjax.errors"},
    "kvjax.grammar": {"kvjax.codec", "kvjax.errors", "kvjax.policy", "kvjax.selection", "kvjax.terms"},
    "kvjax.cache": FOUNDATION | {"kvjax.codec", "kvjax.policy", "kvjax.stages"},
    "kvjax.evidence": FOUNDATION | {"kvjax.selection", "kvjax.stages"},
    "kvjax.empty": FOUNDATION
    | {"kvjax.cache", "kvjax.codec", "kvjax.evidence", "kvjax.policy", "kvjax.selection", "kvjax.stages"},
    "kvjax.compaction": FOUNDATION | {"kvjax._kernels", "kvjax.cache", "kvjax.evidence"},
    "kvjax.eviction": FOUNDATION | EVICTION,
    "kvjax.keeping": FOUNDATION | EVICTION,
    "kvjax.pages": FOUNDATION | {"kvjax._kernels", "kvjax.compaction", "kvjax.evidence"},
    "kvjax.rounds": FOUNDATION | EVICTION,
    "kvjax.filling": FOUNDATION | EVICTION | {"kvjax.empty", "kvjax.rounds"},
    "kvjax.statistics": FOUNDATION,
    "kvjax.torch_file": {"kvjax.errors"},
    "kvjax.triattention_file": FOUNDATION | {"kvjax.statistics", "kvjax.torch_file"},
    "kvjax.statistics_file": FOUNDATION | {"kvjax.statistics", "kvjax.triattention_file"},
    "kvjax.causal": FOUNDATION | {"kvjax._kernels"},
    "kvjax.attention": FOUNDATION | EVICTION | {"kvjax.causal", "kvjax.filling", "kvjax.rounds", "kvjax.statistics"},
    "models": FOUNDATION | MODELS_SEE,
    "kvjax.sampling": {"kvjax.axes", "kvjax.errors"},
    "kvjax.decoding": FOUNDATION | STATE,
    "kvjax.token_loop": FOUNDATION | STATE | {"kvjax.decoding", "kvjax.sampling"},
    "kvjax.generation": FOUNDATION | STATE | {"kvjax.decoding", "kvjax.sampling", "kvjax.token_loop"},
    "kvjax.accounting": FOUNDATION | STATE,
    "kvjax.bench_kernels": {"kvjax._kernels", "kvjax.accounting", "kvjax.peers"},
    "kvjax.bench_step": FOUNDATION
    | STATE
    | {
        "kvjax._kernels",
        "kvjax._program",
        "kvjax.accounting",
        "kvjax.decoding",
        "kvjax.hlo",
        "kvjax.peers",
        "kvjax.progress",
        "kvjax.report",
        "models",
    },
    "kvjax.hlo": set(),
    "kvjax.combinations": {"kvjax.codec", "kvjax.errors", "kvjax.grammar", "kvjax.policy", "kvjax.selection"},
    "kvjax.compilations": set(),
    "kvjax.walk": FOUNDATION | STATE | {"kvjax.decoding", "kvjax.token_loop"},
    "kvjax.forcing": FOUNDATION | STATE | {"kvjax.decoding", "kvjax.walk"},
    "kvjax.foresight": FOUNDATION | {"kvjax._kernels", "kvjax.causal"},
    "kvjax.oracle": FOUNDATION | {"kvjax.cache", "kvjax.foresight", "kvjax.policy", "kvjax.selection"},
    "kvjax.companions": {"kvjax.grammar", "kvjax.oracle", "kvjax.policy"},
    "kvjax.concentration": {"kvjax.statistics"},
    "kvjax.results": {"kvjax.companions", "kvjax.grammar"},
    "kvjax.evaluation": {
        "kvjax.accounting",
        "kvjax.cache",
        "kvjax.companions",
        "kvjax.errors",
        "kvjax.forcing",
        "kvjax.material",
        "kvjax.oracle",
        "kvjax.policy",
        "kvjax.results",
        "kvjax.statistics",
        "kvjax.task",
        "kvjax.text",
        "kvjax.timing",
        "kvjax.walk",
        "models",
    },
    "kvjax.timing": FOUNDATION | STATE | {"kvjax.decoding", "kvjax.walk"},
    "kvjax.text": {"kvjax.errors", "kvjax.folder"},
    "kvjax.byte_tokenizer": {"kvjax.errors"},
    "kvjax.records": {"kvjax.errors", "kvjax.folder"},
    "kvjax.prompts": {"kvjax.errors", "kvjax.records"},
    "kvjax.progress": set(),
    "kvjax.report": {"kvjax._kernels", "kvjax.errors", "kvjax.folder"},
    "kvjax.tracing": FOUNDATION
    | STATE
    | {"kvjax.accounting", "kvjax.companions", "kvjax.decoding", "kvjax.token_loop"},
    "kvjax.pictures": {
        "kvjax._program",
        "kvjax.errors",
        "kvjax.grammar",
        "kvjax.report",
        "kvjax.results",
        "kvjax.selection",
        "kvjax.tracing",
    },
    "kvjax.peer_transformers": set(),
    "kvjax.peers": {"kvjax.errors"},
    "kvjax._program": {"kvjax.errors", "kvjax.folder"},
    "kvjax.corpus": {"kvjax.byte_tokenizer", "kvjax.errors", "kvjax.folder"},
    "kvjax.symbols": set(),
    "kvjax.filler": set(),
    "kvjax.task": {"kvjax.errors", "kvjax.registry", "kvjax.terms"},
    "kvjax.posing": {"kvjax.errors", "kvjax.material", "kvjax.task", "kvjax.text"},
    "kvjax.screen": set(),
    "kvjax.material": {"kvjax.errors", "kvjax.filler", "kvjax.symbols", "kvjax.task", "kvjax.text"},
    "kvjax.task_grammar": {"kvjax.errors", "kvjax.task", "kvjax.terms"},
    "kvjax.words": {"kvjax.errors", "kvjax.filler", "kvjax.task"},
    "kvjax.latex": set(),
    "kvjax.answers": {"kvjax.latex"},
    "kvjax.graph_walk": set(),
    "kvjax.tasks": {
        "kvjax.answers",
        "kvjax.corpus",
        "kvjax.errors",
        "kvjax.folder",
        "kvjax.graph_walk",
        "kvjax.records",
        "kvjax.symbols",
        "kvjax.task",
        "kvjax.words",
    },
    "kvjax.lessons": {
        "kvjax.byte_tokenizer",
        "kvjax.corpus",
        "kvjax.errors",
        "kvjax.filler",
        "kvjax.symbols",
        "kvjax.task",
        "kvjax.text",
    },
    "kvjax.learning": {"kvjax.errors", "models"},
    "kvjax.candidates": {"kvjax.errors", "kvjax.terms"},
    "kvjax.search": {"kvjax.candidates", "kvjax.errors", "kvjax.grammar", "kvjax.policy"},
    "kvjax.judging": {
        "kvjax.evaluation",
        "kvjax.forcing",
        "kvjax.policy",
        "kvjax.search",
        "kvjax.statistics",
        "kvjax.text",
        "kvjax.walk",
        "models",
    },
    "kvjax.trial_record": {"kvjax.errors", "kvjax.policy", "kvjax.report", "kvjax.search"},
    "kvjax.verdict": set(),
    "kvjax.tune_summary": {"kvjax.grammar", "kvjax.policy", "kvjax.search"},
    "kvjax.config_file": {"configs", "kvjax.errors", "kvjax.report"},
    "kvjax": {"kvjax"},  # the list of public names
    "configs": {"configs"},
    **{program: {"kvjax", "models"} for program in PROGRAMS},
}
PACKAGES = (
    "kernels_pallas",
    "kvjax.codecs",
    "kvjax.pictures",
    "kvjax.selections",
    "kvjax.stages",
    "kvjax.tasks",
    "models",
    "configs",
)
"""Packages whose modules share one entry."""

KERNEL_PACKAGES = {
    "jax",
    "jaxtyping",
    "typing",
    "math",
    "struct",
    "functools",
    "dataclasses",
    "collections",
    "kernels_pallas",
}


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path):
    """Modules that a file imports, `from a import b` counted as a and, where that is a module of ours, as a.b."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            submodules = {f"{node.module}.{alias.name}" for alias in node.names}
            ours = {name for name in submodules if (ROOT / (name.replace(".", "/") + ".py")).exists()}
            found |= ours or {node.module}
    return found


def rule_of(module):
    """The entry of the table for a module: its own, or that of its package."""
    if module in MAY_IMPORT:
        return module, MAY_IMPORT[module]
    packages = [package for package in PACKAGES if module.startswith(package + ".")]
    assert packages, f"{module} is not in the table of imports"
    return packages[0], MAY_IMPORT[packages[0]]


def covered(name, entries):
    return any(name == entry or name.startswith(entry + ".") for entry in entries)


@pytest.mark.parametrize("name", NAMES)
def test_imports_point_one_way(name):
    path = ROOT / name
    owner, allowed = rule_of(module_name(path))
    apart = {"kvjax.codecs", "kvjax.selections", "kvjax.tasks"}  # these never import each other
    inside = {owner} if owner in PACKAGES and owner not in apart else set()
    for imported in imports_of(path):
        if imported.split(".")[0] in FOLDERS:
            assert covered(imported, allowed | inside), f"{name} must not import {imported}"


def test_kernels_need_jax_alone():
    """The programs apart."""
    programs = {ROOT / "kernels_pallas" / name for name in ("schedule.py", "support.py")}
    for path in SOURCES:
        if path.is_relative_to(ROOT / "kernels_pallas") and path not in programs:
            outside = {name.split(".")[0] for name in imports_of(path)} - KERNEL_PACKAGES
            assert not outside, f"{path} imports {outside}"


def test_the_table_of_imports_names_what_is_there():
    modules = set(map(module_name, SOURCES)) | set(FOLDERS)
    assert set(MAY_IMPORT) <= modules


@pytest.mark.parametrize("name", NAMES)
def test_sizes(name):
    """Files under 300 lines (kernel bodies 600), functions under 60."""
    text = (ROOT / name).read_text()
    assert text.count("\n") <= (600 if "kernels_pallas" in name else 300)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno - node.lineno + 1 <= 60, f"{name}: {node.name}"


@pytest.mark.parametrize("name", NAMES)
def test_docstrings(name):
    """Every module, public class and public function says what it is."""
    tree = ast.parse((ROOT / name).read_text())
    assert ast.get_docstring(tree), name
    members = [
        node for holder in ast.walk(tree) if isinstance(holder, (ast.Module, ast.ClassDef)) for node in holder.body
    ]
    for node in members:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{name}: {node.name}"


@pytest.mark.parametrize("folder", ["kvjax", "kernels_pallas", "models"])
def test_tests_mirror_sources(folder):
    """A test file stands at the mirrored path of each source file, or its folder's test names it."""
    for path in (ROOT / folder).rglob("*.py"):
        if path.name.startswith("_") or path.parent.name == "families":
            continue
        mirrored = ROOT / "tests" / path.relative_to(ROOT).with_name(f"test_{path.name}")
        assert mirrored.exists(), f"{path.relative_to(ROOT)} has no {mirrored.relative_to(ROOT)}"


def test_importing_touches_no_device_file_or_environment():
    """All modules import with no backend started and the environment as it was."""
    modules = [module_name(path) for path in SOURCES if module_name(path) != "kvjax.peer_transformers"]
    program = f"""
import os, sys
before = dict(os.environ)
for name in {modules!r}:
    __import__(name)
from jax._src import xla_bridge
assert not xla_bridge._backends, "a device was touched"
ours = {{key: value for key, value in os.environ.items() if before.get(key) != value}}
assert not [key for key in ours if not key.startswith(("TF_", "TPU_", "KMP_", "GRPC_"))], ours
"""
    environment = dict(os.environ, PYTHONPATH=str(ROOT))
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_families_are_found_by_listing_their_package():
    files = {path.stem for path in (ROOT / "models" / "families").glob("*.py")} - {"__init__"}
    assert set(FAMILIES.names()) == files == {"llama", "mistral", "qwen2", "qwen3"}


@pytest.mark.parametrize(("registry", "folder"), [(CODECS, "codecs"), (SELECTIONS, "selections"), (TASKS, "tasks")])
def test_methods_are_found_by_listing_their_package(registry, folder):
    files = {path.stem for path in (ROOT / "kvjax" / folder).glob("*.py")} - {"__init__"}
    assert set(registry.names()) == files
