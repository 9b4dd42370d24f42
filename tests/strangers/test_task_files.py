"""Task files of strangers: none of the ways by which one can name code is taken without trust."""

import shutil
from pathlib import Path

import pytest
from lm_eval import utils as lm_utils

from dtfcli.errors import ConfigError
from dtfcli.evaluation.task_files import check_task_files, sandboxed_templates
from tests.strangers.conftest import TASK
from tests.strangers.test_readers import load_task
from tests.strangers.test_trust import CODE


@pytest.fixture
def texts(healthy: Path, tmp_path: Path) -> Path:
    """A benchmark with its task file, and a Python file beside it that leaves a mark."""
    folder = shutil.copytree(healthy / "texts", tmp_path / "it")
    functions = "\n\ndef docs(dataset):\n    return dataset\n"
    (folder / "tasks" / "theirs.py").write_text(CODE.format(marker=str(tmp_path / "ran")) + functions)
    return folder


NAMES_CODE: dict[str, tuple[str, str]] = {
    "a function": ("process_docs: !function theirs.docs\n", r"process_docs = !function theirs\.docs"),
    "a function inside": ("fewshot_config: {samples: [!function theirs.docs]}\n", r"fewshot_config\.samples\.0 = "),
    "a function as a key": ("metadata: {!function theirs.docs : 1}\n", "names Python code"),
    "another tag": ("description: !theirs x\n", "description = !theirs x"),
    "a class": ("class: !function theirs.docs\n", "class: a task written in Python"),
    "a metric": ("metric_list: [{metric: ./theirs}]\n", r"metric_list\.0\.metric = './theirs': lm-eval has no such"),
    "a metric's script": ("metric_list: [{metric: acc, hf_evaluate: true}]\n", r"hf_evaluate = 'True'"),
    "a pickle": ("dataset_path: pandas\n", "dataset_path = 'pandas': this format may hold code"),
    "a script": ("dataset_path: ./theirs.py\n", "a Python file"),
    "generation": ("generation_kwargs: {custom_generate: ./it}\n", "custom_generate = './it': names Python code"),
    "a prompt": ("use_prompt: /tmp/it.yaml:x\n", "use_prompt"),
    "permission": ("group: g\ntask: [{group: a, task: [{task: humaneval, unsafe_code: false}]}]\n", "unsafe_code"),
}


@pytest.mark.parametrize("name", NAMES_CODE)
@pytest.mark.parametrize("included", [False, True])
def test_code_is_not_run(texts: Path, tmp_path: Path, name: str, included: bool) -> None:
    lines, said = NAMES_CODE[name]
    file = texts / "tasks" / ("_shared" if included else "more.yaml")  # lm-eval includes files of any ending
    file.write_text(lines)
    if included:
        (texts / "tasks" / "more.yaml").write_text("task: more\ninclude: _shared\n")
    with pytest.raises(ConfigError, match=said) as caught:
        load_task(texts)
    assert str(caught.value).startswith(f"{file}: ")
    assert str(caught.value).endswith("; take it out, or read that code and add --trust-remote-code.")
    assert not (tmp_path / "ran").exists()
    check_task_files(texts / "tasks", trusted=True)


def test_code_runs_when_it_is_trusted(texts: Path, tmp_path: Path) -> None:
    plain = load_task(texts)
    (texts / "tasks" / "task.yaml").write_text(TASK + "process_docs: !function theirs.docs\n")
    assert load_task(texts, trusted=True) == plain
    assert (tmp_path / "ran").exists()


def test_tags_of_python_are_never_read(texts: Path) -> None:
    (texts / "tasks" / "more.yaml").write_text("task: more\ndescription: !!python/object/apply:os.getcwd []\n")
    for trusted in (False, True):
        with pytest.raises(ConfigError, match=r"more\.yaml: cannot be read"):
            load_task(texts, trusted)


def test_a_circle_of_includes_is_read_once(texts: Path) -> None:
    (texts / "tasks" / "_a").write_text("include: more.yaml\n")
    (texts / "tasks" / "more.yaml").write_text("task: more\ninclude: _a\n")
    check_task_files(texts / "tasks")


ESCAPES = (
    "{{ lipsum.__globals__['os'].system('touch MARKER') }}",
    "{{ cycler.__init__.__globals__.os.system('touch MARKER') }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ question['__class__'].__mro__ }}",
    "{{ (question|attr('__class__')).__mro__ }}",
    "{{ '{0.__class__.__mro__}'.format(question) }}",
)


@pytest.mark.parametrize("template", ESCAPES)
def test_templates_do_not_reach_python(texts: Path, tmp_path: Path, template: str) -> None:
    hostile = template.replace("MARKER", str(tmp_path / "ran"))
    (texts / "tasks" / "task.yaml").write_text(TASK.replace('"{{question}}"', f'"{hostile}"'))
    for trusted in (False, True):
        with pytest.raises(ConfigError, match=r"cannot be loaded\..*; mend .*task\.yaml"):
            load_task(texts, trusted)
    assert not (tmp_path / "ran").exists()


def test_templates_of_later_documents_do_not_either(tmp_path: Path) -> None:
    """lm-eval tries the first document alone before it scores."""
    stock, document = lm_utils.env, {"question": "a b", "n": 3}
    with sandboxed_templates():
        for plain in ("{{question.split(' ')[::-1]|join('-')}}", "{{question|regex_replace('b', 'c')}}", "{{n + 1}}"):
            assert lm_utils.apply_template(plain, document) == lm_utils.env.from_string(plain).render(**document)
    with pytest.raises(ConfigError, match=r"leads into Python \(access to attribute '__cl"), sandboxed_templates():
        lm_utils.apply_template("{{question.__class__.__mro__}}", document)
    assert lm_utils.env is stock
