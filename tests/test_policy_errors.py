"""Every message a bad policy gives, with its place. All problems of a source come at once."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dilcompile.errors import FormError, PolicyError
from dilcompile.forms import Dilated
from dilcompile.policy import Policy
from dilcompile.policy.load import PRESETS

HAS = "this version has keep, ring, dense, sliding_window, dilated, block_sparse, keep_structure, union"
KERNELS = "'native', 'sdpa', 'flash_band', 'triton', 'flash_attn', 'cudnn', 'efficient', 'flex', 'flash', 'cpu' or 'reference'"
TAIL = "apply: {form: keep}"


def problems(source: object) -> list[str]:
    with pytest.raises(PolicyError) as caught:
        Policy.load(source)  # type: ignore[arg-type]
    return caught.value.problems


def text_problems(text: str) -> list[str]:
    with pytest.raises(PolicyError) as caught:
        Policy.from_yaml(text)
    return caught.value.problems


def test_all_problems_of_a_file_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("bad.yaml").write_text(
        """version: 1
rules:
  - name: first
    match: {kind: any, casual: true}
    apply:
      form: dilated
      segments: [2048, 4096, 8192]
      rates: [1, 2]
  - name: second
    apply: {form: keep}
  - name: third
    apply: {form: dilatd}
fallback: {}
fallback: {}
"""
    )
    assert problems("bad.yaml") == [
        "bad.yaml:4:24: rules[0].match.casual: unknown key (did you mean 'causal'?)",
        "bad.yaml:6:7: rules[0].apply.dilated: segments has 3 entries but rates has 2; give one rate a segment",
        f"bad.yaml:12:19: rules[2].apply.form: unknown form 'dilatd': {HAS} (did you mean 'dilated'?)",
        "bad.yaml:13:1: fallback: unknown key (did you mean 'defaults.fallback'?)",
        "bad.yaml:14:1: duplicate key 'fallback' (first at line 13)",
    ]
    with pytest.raises(PolicyError, match=re.escape(problems("bad.yaml")[0])):
        Policy.load("bad.yaml")


def test_dict_problems_name_the_path() -> None:
    assert problems({"rules": [{"match": {"casual": True}, "apply": {"form": "keep"}}]}) == [
        "<dict>: rules[0].match.casual: unknown key (did you mean 'causal'?)"
    ]


IN_RULE = {
    # match
    "match: {min_seq: true}": "match.min_seq: expected a whole number of at least 1 or 'auto', got true",
    "match: {min_seq: 0}": "match.min_seq: expected a whole number of at least 1, got 0",
    "match: {min_seq: 2.5}": "match.min_seq: expected a whole number of at least 1 or 'auto', got 2.5",
    "match: {min_seq: .nan}": "match.min_seq: expected a whole number of at least 1 or 'auto', got nan",
    "match: {min_seq: '16'}": "match.min_seq: expected a whole number of at least 1 or 'auto', got '16'",
    "match: {min_seq: auot}": "match.min_seq: expected a whole number of at least 1 or 'auto', got 'auot' (did you mean 'auto'?)",
    "match: {min_seq: }": "match.min_seq: expected a whole number of at least 1 or 'auto', got nothing",
    "match: {causal: yes}": "match.causal: expected true or false, got 'yes'",
    "match: {causal: 1}": "match.causal: expected true or false, got 1",
    "match: {kind: slef}": "match.kind: expected 'self', 'cross' or 'any', got 'slef' (did you mean 'self'?)",
    "match: {masked: []}": "match.masked: expected a list (each entry 'none', 'causal', 'window', 'chunk', 'prefix', 'document', 'label', 'rows', 'pairs', 'padding' or"
    " 'other'), got an empty list",
    "match: {masked: [causal, windw]}": "match.masked[1]: expected 'none', 'causal', 'window', 'chunk', 'prefix', 'document', 'label', 'rows', 'pairs', 'padding' or"
    " 'other', got 'windw' (did you mean 'window'?)",
    "match: {module: ''}": "match.module: expected text, got an empty text",
    "match: {module: 7}": "match.module: expected a module pattern or a list of them, got 7",
    "match: {module: 'layers.[0'}": "match.module: the glob 'layers.[0' has a '[' that is never closed",
    "match: {module: ' a'}": "match.module: the glob ' a' starts or ends with a space",
    "match: {module: [ok, 're:(']}": "match.module[1]: 're:(' is not a regular expression: missing ), unterminated"
    " subpattern at position 0",
    "match: {layers: 3-1}": "match.layers: the range '3-1' ends before it starts",
    "match: {layers: '0-3,x'}": "match.layers: 'x' in '0-3,x' is not a number, 'a-b' or 'a-'",
    "match: {layers: -1}": "match.layers: expected a whole number of at least 0, got -1",
    "match: {compute_capability: '>=new'}": "match.compute_capability: '>=new' is not a comparison such as '>=9.0'",
    "match: {device: gpuu}": "match.device: torch knows no device 'gpuu'",
    "match: {dtype: bf17}": "match.dtype: expected 'float64', 'float32', 'float16', 'bfloat16', 'fp64', 'fp32', 'fp16', 'bf16'"
    " or a list of them, got 'bf17' (did you mean 'bf16'?)",
    "match: [a]": "match: expected a mapping, got a list",
    "match: ": "match: expected a mapping, got nothing",
    # shard, memory, numerics, fallback
    "shard: {mesh: cp}": "shard.mesh: unknown mesh axis 'cp': the policy has no mesh",
    "shard: {}": "shard: key 'mesh' is missing",
    "shard: {mesh: 3, method: ring}": "shard.mesh: expected text or a list of them, got 3",
    "memory: {budget: 6GB}": "memory.budget: '6GB' is not a size such as '6GiB' (units: B, KiB, MiB, GiB, TiB)",
    "memory: {budget: 0B}": "memory.budget: '0B' is less than a byte",
    "memory: {budget: true}": "memory.budget: expected a number of bytes or a size such as '6GiB', got true",
    "numerics: {tolerance: {rel_l2: .inf}}": "numerics.tolerance.rel_l2: expected a finite number, got inf",
    "numerics: {tolerance: {rel_l2: 0}}": "numerics.tolerance.rel_l2: expected a number above 0, got 0",
    "numerics: {accumulate: bf16}": "numerics.accumulate: expected 'fp32', got 'bf16'",
    "fallback: {unsuported: warn}": "fallback.unsuported: unknown key (did you mean 'unsupported'?)",
    # keys in the wrong place
    "segments: auto": "segments: unknown key (did you mean 'apply.segments'?)",
    "min_seq: 3": "min_seq: unknown key (did you mean 'match.min_seq'?)",
    "wibble: 3": "wibble: unknown key",
}


@pytest.mark.parametrize(("line", "expected"), IN_RULE.items())
def test_problems_in_a_rule(line: str, expected: str) -> None:
    found = text_problems(f"rules:\n  - apply: {{form: keep}}\n    {line}\n")
    assert [re.sub(r"^<text>:3:\d+: rules\[0\]\.", "", problem) for problem in found] == [expected]


IN_APPLY = {
    "{}": f"apply: key 'form' is missing: {HAS}",
    "{form: 3}": f"apply.form: expected the name of a form, got 3: {HAS}",
    "keep": "apply: expected a mapping, got 'keep'",
    "{form: union}": "apply.union: key 'of' is missing",
    "{form: block_sparse, block: 64}": "apply.block_sparse: key 'pattern' is missing",
    "{form: block_sparse, block: 64, pattern: {locl: {}}}": "apply.pattern: pattern 'locl' is unknown (did you mean 'local'?); the"
    " patterns are any, all, local, global, strided, dilated_sliding, fixed, vertical_slash, hierarchical, random, document, near, explicit, topk, mass, given, bigbird, longformer, heads, groups",
    "{form: per_head}": f"apply.form: form 'per_head' is not built yet: {HAS}",
    "{form: ring}": "apply.form: form 'ring' needs the ranks that the keys go around: add shard: {mesh: AXIS}",
    "{form: windowed}": f"apply.form: unknown form 'windowed': {HAS}",
    "{form: keep, kernel: 3}": f"apply.kernel: expected {KERNELS}, got 3",
    "{form: dense, kernel: flesh}": f"apply.kernel: expected {KERNELS}, got 'flesh' (did you mean 'flash'?)",
    "{form: sliding_window}": "apply.sliding_window: key 'window' is missing",
    "{form: sliding_window, window: true}": "apply.window: expected a whole number, got true",
    "{form: sliding_window, window: 0}": "apply.window: must be a whole number of at least 1, not 0",
    "{form: sliding_window, windw: 4, window: 4}": "apply.windw: unknown key (did you mean 'window'?)",
    "{form: dilated, window: 4}": "apply.window: unknown key (form 'dilated' takes no such key; sliding_window does)",
    "{form: keep, segments: [4]}": "apply.segments: unknown key (form 'keep' takes no such key; dilated does)",
    "{form: dense, sinks: 4}": "apply.sinks: unknown key (form 'dense' takes no such key; sliding_window, dilated do)",
    "{form: keep, min_seq: 4}": "apply.min_seq: unknown key (did you mean 'match.min_seq'?)",
    "{form: dilated, offset: heads}": "apply.offset: expected 'head_mod', 'head_block', 'branch', 'zero' or 'own', got 'heads'"
    " (did you mean 'head_mod'?)",
    "{form: dilated, segments: [], rates: []}": "apply.segments: expected a list (each entry a whole number or 'seq'), got an"
    " empty list",
    "{form: dilated, segments: [4, seqq], rates: [1, 2]}": "apply.segments[1]: expected a whole number or 'seq', got 'seqq' (did you mean 'seq'?)",
    "{form: dilated, segments: [4, 9], rates: [1, 2]}": "apply.segments[1]: 9 is not a multiple of rates[1]=2; use 8",
    "{form: dilated, segments: [4, true], rates: [1, 2]}": "apply.segments[1]: expected a whole number or 'seq', got true",
    "{form: dilated, output_scale: .nan}": "apply.output_scale: expected a finite number, got nan",
}


@pytest.mark.parametrize(("value", "expected"), IN_APPLY.items())
def test_problems_in_apply(value: str, expected: str) -> None:
    found = text_problems(f"rules:\n  - apply: {value}\n")
    assert [re.sub(r"^<text>:2:\d+: rules\[0\]\.", "", problem) for problem in found][:1] == [expected]


SEVERAL = {
    "{form: dilated, segments: [16, 0, 10], rates: [4, 1, 4], offset: foo, sinks: -1, local: -2, heads: x}": [
        "segments[1]: must be a whole number of at least 1, not 0",
        "segments[2]: 10 is not a multiple of rates[2]=4; use 8",
        "offset: expected 'head_mod', 'head_block', 'branch', 'zero' or 'own', got 'foo'",
        "sinks: must be a whole number of at least 0, not -1",
        "local: must be a whole number of at least 0, not -2",
        "heads: expected 'all' or 'grouped', got 'x'",
    ],
    "{form: dilated, segments: [0, -4], rates: [1, 0]}": [
        "segments[0]: must be a whole number of at least 1, not 0",
        "segments[1]: must be a whole number of at least 1, not -4",
        "rates[1]: must be a whole number of at least 1, not 0",
    ],
    "{form: dilated, segments: [16, 8, 9], rates: [1, 4], ofset: own}": [
        "dilated: segments has 3 entries but rates has 2; give one rate a segment",
        "ofset: unknown key (did you mean 'offset'?)",
    ],
    "{form: dilated, segments: [true, 9, 2.5, 0], rates: [x, 2, 1, nan]}": [
        "segments[0]: expected a whole number or 'seq', got true",
        "segments[1]: 9 is not a multiple of rates[1]=2; use 8",
        "segments[2]: expected a whole number or 'seq', got 2.5",
        "segments[3]: must be a whole number of at least 1, not 0",
        "rates[0]: expected a whole number, got 'x'",
        "rates[3]: expected a whole number, got 'nan'",
    ],
    "{form: dilated, segments: [8, 16], rates: [2, 4], ofset: own}": [
        "dilated: rates (2, 4) leave queries without any key (heads='all', offset='head_mod'); add a branch of rate 1, "
        "offset='own', sinks or local keys, or accept zeros with coverage='zero'",
        "ofset: unknown key (did you mean 'offset'?)",
    ],
    # What can't be told yet is not said: rates of the wrong type may well leave no query without keys.
    "{form: dilated, segments: [8, 16], rates: [2, x]}": ["rates[1]: expected a whole number, got 'x'"],
    "{form: dilated, segments: [8, 16], rates: {}}": [
        "rates: expected a list (each entry a whole number) or 'auto', got a mapping"
    ],
    "{form: dilated, segments: [8], rates: [2], sinks: few}": ["sinks: expected a whole number, got 'few'"],
    "{form: sliding_window, sinks: -1, step: 0}": [
        "sliding_window: key 'window' is missing",
        "sinks: must be a whole number of at least 0, not -1",
        "step: must be a whole number of at least 1, not 0",
    ],
}


@pytest.mark.parametrize(("value", "expected"), SEVERAL.items())
def test_all_problems_of_one_rule_at_once(value: str, expected: list[str]) -> None:
    found = text_problems(f"rules:\n  - apply: {value}\n")
    places = [re.match(r"<text>:2:(\d+): rules\[0\]\.apply\.", problem) for problem in found]
    assert [problem[place.end() :] for problem, place in zip(found, places, strict=True) if place] == expected
    columns = [int(place[1]) for place in places if place]
    assert columns == sorted(columns)
    assert min(columns) >= len("  - apply: ")


def test_all_entries_of_a_list_that_are_wrong() -> None:
    found = text_problems("rules:\n- match: {masked: [causl, 3, none], layers: [1, x, -1]}\n  apply: {form: keep}\n")
    assert [problem.split(": ")[:2] for problem in found] == [
        ["<text>:2:20", "rules[0].match.masked[0]"],
        ["<text>:2:27", "rules[0].match.masked[1]"],
        ["<text>:2:49", "rules[0].match.layers[1]"],
        ["<text>:2:52", "rules[0].match.layers[2]"],
    ]


def test_an_unknown_mesh_axis_beside_other_problems() -> None:
    text = (
        "mesh: {cp: {size: 0}}\nrules:\n- {apply: {form: kep}, shard: {mesh: cpp}}\n- {apply: {form: keep}, shard: {mesh: cp}}\n"
        "- {apply: {form: keep}, shard: []}\n"
    )
    assert [problem.split(": ")[:2] for problem in text_problems(text)] == [
        ["<text>:1:19", "mesh.cp.size"],
        ["<text>:3:18", "rules[0].apply.form"],
        ["<text>:5:32", "rules[2].shard"],
        ["<text>:3:38", "rules[0].shard.mesh"],
    ]


def test_an_unknown_method() -> None:
    text = "mesh: {cp: {size: 2}}\nrules:\n- {apply: {form: keep}, shard: {mesh: cp, method: rign}}\n"
    assert text_problems(text) == [
        "<text>:3:51: rules[0].shard.method: expected 'auto', 'gather_needed', 'halo', 'ring', 'all_gather', 'ulysses', 'usp' or "
        "'tree', got 'rign' (did you mean 'ring'?)"
    ]


def test_an_axis_may_stand_in_a_file_that_can_not_be_read() -> None:
    assert text_problems("extends: [none.yaml]\nrules: [{apply: {form: keep}, shard: {mesh: cp}}]\n") == [
        "<text>:1:11: extends[0]: 'none.yaml': no such file"
    ]


def test_a_form_says_everything_too() -> None:
    with pytest.raises(FormError) as caught:
        Dilated(segments=(0, 9), rates=(1, 2), sinks=-1)
    assert str(caught.value) == (
        "form dilated: segments[0] must be a whole number of at least 1, not 0; segments[1]=9 is not a multiple of rates[1]=2; "
        "use 8; sinks must be a whole number of at least 0, not -1"
    )
    assert [problem.at for problem in caught.value.problems] == [("segments", 0), ("segments", 1), ("sinks",)]


WHOLE = {
    "\n": ["<text>:1:1: the file is empty"],
    "a: [1\n": ["<text>:2:1: not YAML: while parsing a flow sequence, expected ',' or ']', but got '<stream end>'"],
    "a: b: c\n": ["<text>:1:5: not YAML: mapping values are not allowed here"],
    "a: 1\n---\nb: 2\n": ["<text>:2:1: not YAML: expected a single document in the stream, but found another document"],
    "name: \x01\n": ["<text>:1:7: not YAML: character 1 is not allowed"],
    "name: !!python/object:os.system x\n" + f"rules: [{{{TAIL}}}]": [
        "<text>:1:7: the tag 'python/object:os.system' is not allowed"
    ],
    "name: &a [*a]\n": ["<text>:1:7: an alias may not contain itself"],
    "rules: &a\n  - *a\n": ["<text>:1:8: an alias may not contain itself"],
    "[1]: 2\n": ["<text>:1:1: a key must be text"],
    "- a\n": ["<text>:1:1: a policy is a mapping with 'rules', got a list"],
    "version: 1\n": ["<text>:1:1: no rules: give at least one under 'rules', or extend a preset"],
    "version: 2\n" + f"rules: [{{{TAIL}}}]": ["<text>:1:10: version: expected 1, the version of the policy language, got 2"],
    "version: true\n" + f"rules: [{{{TAIL}}}]": [
        "<text>:1:10: version: expected 1, the version of the policy language, got true"
    ],
    "rules: []\n": ["<text>:1:8: rules: expected at least one entry, got an empty list"],
    "rules: {}\n": ["<text>:1:8: rules: expected a list, got a mapping"],
    "rules:\n- keep\n": ["<text>:2:3: rules[0]: expected a mapping, got 'keep'"],
    "rules:\n- {name: a}\n": ["<text>:2:3: rules[0]: key 'apply' is missing"],
    "ruls:\n- 1\n": [
        "<text>:1:1: ruls: unknown key (did you mean 'rules'?)",
    ],
    f"extends: lognet\nrules: [{{{TAIL}}}]\n": [
        "<text>:1:10: extends: 'lognet': no preset or file of this name: the presets are exact, longnet, pretrained-safe"
        " (did you mean 'longnet'?)"
    ],
    f"extends: []\nrules: [{{{TAIL}}}]\n": ["<text>:1:10: extends: expected a list (each entry text), got an empty list"],
    f"rules:\n- {{name: a, {TAIL}}}\n- {{name: a, {TAIL}}}\n": [
        "<text>:3:10: rules[1].name: duplicate rule name 'a' (first at rules[0])"
    ],
    f"mesh: {{cp: {{size: 0}}}}\nrules: [{{{TAIL}}}]\n": [
        "<text>:1:19: mesh.cp.size: expected a whole number of at least 1, got 0"
    ],
    f"mesh: {{cp: {{size: 2}}}}\nrules:\n- {{shard: {{mesh: cpp}}, {TAIL}}}\n": [
        "<text>:3:18: rules[0].shard.mesh: unknown mesh axis 'cpp': mesh has cp (did you mean 'cp'?)"
    ],
    f"base: &b {{kind: self}}\nrules:\n- match: {{<<: *b, kidn: self}}\n  {TAIL}\n": [
        "<text>:1:1: base: unknown key",
        "<text>:3:19: rules[0].match.kidn: unknown key (did you mean 'kind'?)",
    ],
    f"rules:\n- match: {{<<: 3}}\n  {TAIL}\n": ["<text>:2:15: '<<' takes a mapping or a list of mappings"],
}


@pytest.mark.parametrize(("text", "expected"), WHOLE.items())
def test_problems_of_the_whole(text: str, expected: list[str]) -> None:
    assert text_problems(text) == expected


def test_deep_nesting_is_a_problem_not_a_crash() -> None:
    assert text_problems("a: " + "[" * 5000 + "\n")[0].startswith("<text>:1:1: nested too deeply")


def test_sources_that_are_no_policy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("policy.yaml").write_text(f"rules: [{{{TAIL}}}]\n")
    Path("latin.yaml").write_bytes(b"name: \xe9\n")
    Path("folder").mkdir()
    known = "the presets are exact, longnet, pretrained-safe"
    assert problems("polcy.yaml") == ["polcy.yaml: no such file (did you mean 'policy.yaml'?)"]
    assert problems("longnet.yaml") == ["longnet.yaml: no such file (did you mean 'longnet'?)"]
    assert problems("lognet") == [f"lognet: no preset or file of this name: {known} (did you mean 'longnet'?)"]
    assert problems("zzz") == [f"zzz: no preset or file of this name: {known}"]
    assert problems("folder") == ["folder: is a folder, not a policy file"]
    assert problems("latin.yaml") == ["latin.yaml: the file is not UTF-8 text (byte 6)"]
    assert problems(3) == ["a policy is a path, a preset's name, a dict or a Policy, not 3"]
    for empty in ("", "  "):
        assert problems(empty) == ["a policy is a path, a preset's name, a dict or a Policy, not an empty text"]
    monkeypatch.setenv("DILCOMPILE_POLICY", " ")
    assert problems(None) == ["DILCOMPILE_POLICY: a policy is a path, a preset's name, a dict or a Policy, not an empty text"]
    monkeypatch.setenv("DILCOMPILE_POLICY", "zzz")
    assert problems(None) == [f"DILCOMPILE_POLICY: zzz: no preset or file of this name: {known}"]


def test_extends_problems_name_both_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.yaml").write_text(f"extends: [b.yaml]\nrules: [{{{TAIL}}}]\n")
    Path("b.yaml").write_text(f"extends: [a.yaml]\nrules: [{{{TAIL}, nme: x}}]\n")
    assert problems("a.yaml") == [
        "b.yaml:1:11: extends[0]: extends itself: a.yaml -> b.yaml -> a.yaml",
        "b.yaml:2:31: rules[0].nme: unknown key (did you mean 'name'?)",
    ]


def test_a_dict_may_hold_no_strange_keys() -> None:
    assert problems({1: 2, "rules": [{"apply": {"form": "keep"}}]}) == ["<dict>: expected text as a key, got 1"]


def test_presets_have_no_problems() -> None:
    for name in PRESETS:
        Policy.load(name)


WORDS = [
    "rules",
    "match",
    "apply",
    "form",
    "module",
    "shard",
    "mesh",
    "extends",
    "defaults",
    "numerics",
    "tolerance",
    "version",
    "x",
]
junk = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 3)
    | st.floats()
    | st.sampled_from([*WORDS, "dilated", "keep", "longnet", "re:("]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(WORDS), inner, max_size=4),
    max_leaves=20,
)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.sampled_from(WORDS), junk, max_size=4), junk, junk)
def test_junk_is_a_policy_error_and_nothing_else(content: dict[str, Any], rule: object, value: object) -> None:
    for source in (content, {"rules": [rule]}, {"rules": [{"apply": value, "match": rule}]}, {"mesh": value, "rules": content}):
        lines = ["<dict>: fine"]
        try:
            Policy.load(source)
        except PolicyError as error:
            lines = error.problems
        assert lines
        assert all(line.startswith(("<dict>: ", "preset ")) for line in lines)


@settings(max_examples=200, deadline=None)
@given(st.text(st.sampled_from("ab:[]{}-,&*<!|>'\"#\n ?%@`\t1."), max_size=30))
def test_junk_text_is_a_policy_error_and_nothing_else(text: str) -> None:
    assert all(re.match(r"<text>:\d+:\d+: ", line) for line in text_problems(text + "\n"))
