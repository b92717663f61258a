"""Policies typed as strings: every term, and whatever cannot be is refused with the way out."""

import dataclasses

import pytest

from kvjax.codec import ExactSizes
from kvjax.errors import UserError
from kvjax.grammar import parse_policy, split_policies
from kvjax.policy import Heads, Layers, PinnedPrompt, Policy
from kvjax.selection import SELECTIONS


def test_strings_and_policies_are_taken():
    assert parse_policy("full") == parse_policy(" full ") == parse_policy(Policy()) == Policy()
    assert hash(parse_policy("full")) == hash(Policy())
    assert str(Policy()) == "full"


@pytest.mark.parametrize(
    "text",
    [
        "int8",
        "turboquant(bits=4)",
        "turboquant(bits=2.5,rotation=dense)",
        "kivi(bits=2)+exact(sinks=4,window=128)",
        "key(turboquant,bits=4)+value(int4)+edges(2)",
        "key(int8)+exact(round=64)",
        "snapkv(budget=1024)+int4",
        "h2o(budget=0.25)+layers(pyramid,beta=10)+heads(adaptive,floor=0.5)",
        "streaming+prompt(2048)+protect(values=0.01)+edges(1)",
        "triattention(budget=512,mode=union)+kivi+prompt(inside)",
        "tova+layers(512,256,256,128)+exact(window=64)",
        "int2+int4(part=1/2)",
        "key(int8,part=1/2)+key(turboquant,bits=3,part=2/2)+value(int4)+edges(1)",
    ],
)
def test_the_text_of_a_policy_reads_back_as_the_same_policy(text):
    policy = parse_policy(text)
    assert policy.text == text
    assert parse_policy(str(policy)) == policy
    assert hash(policy) == hash(parse_policy(f" {text} "))


def test_codecs_for_both_and_apart():
    both, apart = parse_policy("int4"), parse_policy("key(int4)+value(int4)")
    assert (both.keys, both.values) == (apart.keys, apart.values)
    assert both.keys.role == "keys"
    assert both.values.role == "values"
    keys_alone = parse_policy("key(int8)")
    assert keys_alone.values == Policy().values
    assert keys_alone.keys == parse_policy("int8").keys


def test_the_exact_segment_is_the_codecs_own_unless_the_policy_says_otherwise():
    assert parse_policy("int4").exact == ExactSizes(sinks=4, window=128, round=128)
    assert parse_policy("kivi").exact == ExactSizes(sinks=0, window=0, round=128)
    assert parse_policy("oscar").exact == ExactSizes(sinks=64, window=256, round=128)
    assert parse_policy("kivi+exact(window=64)").exact == ExactSizes(sinks=0, window=64, round=128)


def test_parts_of_the_layers_have_codecs_of_their_own():
    """A term without a part has the parts that no other term names."""
    policy = parse_policy("int2+key(int8,part=1/3)+int4(part=3/3)")
    int8, int4, int2 = map(parse_policy, ("int8", "int4", "int2"))
    assert policy.parts[0] == (int8.keys, int2.keys, int4.keys)
    assert policy.parts[1] == (int2.values, int2.values, int4.values)
    assert (policy.keys, policy.values) == (int8.keys, int2.values)
    assert parse_policy("int4+value(int2,part=1/2)").parts[0] == ()
    assert parse_policy("int8(part=1/1)").keys == int8.keys


def test_lists_of_policies_split_outside_parentheses():
    listed = "full;int8, turboquant(bits=4,rotation=dense)+edges(1);"
    assert split_policies("snapkv+layers(512,256),h2o") == ["snapkv+layers(512,256)", "h2o"]
    assert split_policies(listed) == ["full", "int8", "turboquant(bits=4,rotation=dense)+edges(1)"]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("", "A policy is a string such as 'full'"),
        (3, "A policy is a string such as 'full'"),
        (None, "A policy is a string such as 'full'"),
        ("int9", "Unknown policy term 'int9'. Did you mean 'int"),
        ("turbquant(bits=4)", "Unknown policy term 'turbquant'. Did you mean 'turboquant'"),
        ("int8(bit=4)", "Unknown argument of int8 'bit'"),
        ("turboquant(bits=5)", r"turboquant\(bits\) is 5.0; it must be one of 1, 2, 2.5, 3, 3.5, 4. The nearest is 4"),
        ("turboquant(bits=two)", r"turboquant\(bits\) is 'two'; it must be a number"),
        ("kivi(bits=9)", r"kivi\(bits\) is 9; .* The nearest is 8"),
        ("int4(rotation=hadamar)", r"int4\(rotation\) is hadamar; .* The nearest is hadamard"),
        ("int4(hadamard)", "int4 takes arguments by name"),
        ("int4(rotation=none,rotation=dense)", "gives rotation twice"),
        ("int8+int4", "two codecs for keys"),
        ("int8+value(int4)", "two codecs for values"),
        ("key()", r"key\(\.\.\.\) begins with a codec"),
        ("exact(sinks=4)", "names no codec and no selection; .*'full\\+exact"),
        ("int8+exact(4)", "exact takes sinks, window and round by name"),
        ("int8+exact(sink=4)", "Unknown argument of exact 'sink'. Did you mean 'sinks'"),
        ("int8+exact(window=-1)", r"exact\(window\) is -1; it must be at least 0"),
        ("kivi+exact(round=40)", r"exact\(round\) is 40; .* multiple of 32. The nearest is 32"),
        ("int2+exact(round=12)", "multiple of 8. The nearest is 16"),
        ("int8+edges(x)", "edges takes one whole number"),
        ("int8+edges(1)+edges(1)", "edges twice"),
        ("full(bits=2)", "full takes no arguments"),
        ("int4(rotation=dense", "is no term of a policy"),
        ("int\n9", "'int 9' is no term of a policy"),
        ("int8(part=1/2)", "leaves part 2/2 of the layers open; add a codec without part"),
        ("int8+int4(part=1/2)+int2(part=1/2)", "two codecs for keys"),
        ("int8+int4(part=1/2)+int2(part=3/3)", "parts by 2 and by 3; use one number"),
        ("int8+int4(part=3/2)", "part is '3/2'; it says which of how many equal parts"),
        ("int8+int4(part=0.5)", "part is '0.5'; it says which of how many equal parts"),
        ("key(kivi,part=1/2)+int8+exact(round=40)", r"exact\(round\) is 40; .* multiple of 32"),
        ("lowrank", "either rank=R or energy=SHARE"),
        ("lowrank(energy=2)", r"lowrank\(energy\) is 2.0; it must be at least 0.01 and at most 1.0"),
        ("think(ratio=1)", r"think\(ratio\) is 1.0; it must be at least 0.0 and below 1.0"),
    ],
)
def test_others_are_refused_with_the_way_out(wrong, message):
    with pytest.raises(UserError, match=message) as caught:
        parse_policy(wrong)
    assert "\n" not in str(caught.value)


def test_a_selection_and_its_arguments():
    policy = parse_policy("snapkv(budget=512,queries=32,kernel=7,pool=max)+int4")
    assert policy.selection == SELECTIONS.get("snapkv")(budget=512, queries=32, kernel=7, pool="max")
    assert (policy.keys, policy.values) == (parse_policy("int4").keys, parse_policy("int4").values)
    plain = parse_policy("snapkv")
    assert plain.selection.budget == 2048
    assert (plain.keys, plain.values) == (Policy().keys, Policy().values)
    assert parse_policy("snapkv()+full") == dataclasses.replace(plain, text="snapkv+full")
    assert parse_policy("int4+snapkv").selection == plain.selection


def test_budgets_are_whole_numbers_or_shares():
    budgets = {"1024": 1024, "0.25": 0.25, "1.0": 1.0, "1": 1, "1e-1": 0.1}
    exact = "+exact(sinks=0,window=0)"
    for text, budget in budgets.items():
        read = parse_policy(f"h2o(budget={text}){exact}").selection.budget
        assert (read, type(read)) == (budget, type(budget))


def test_selections_without_a_term_have_their_own_spread():
    assert parse_policy("snapkv").layers == Layers()
    assert parse_policy("snapkv").heads == Heads()
    assert parse_policy("pyramidkv").layers == Layers(kind="pyramid", beta=20.0)
    assert parse_policy("adakv").heads == Heads(kind="adaptive", floor=0.2)
    assert parse_policy("criticalkv(base=adakv)").heads == Heads(kind="adaptive")
    assert parse_policy("criticalkv(base=pyramidkv)").layers == Layers(kind="pyramid")
    assert parse_policy("pyramidkv+layers(uniform)").layers == Layers()
    assert parse_policy("adakv+heads(uniform)").heads == Heads()


def test_what_a_selection_protects_where_the_policy_says_nothing():
    """Four sinks and 128 newest, whatever the codec; a codec alone asks for its own."""
    assert parse_policy("snapkv+kivi").exact == parse_policy("snapkv").exact == ExactSizes()
    assert parse_policy("snapkv+kivi+exact(sinks=0)").exact == ExactSizes(sinks=0, window=128, round=128)


def test_terms_that_say_how():
    policy = parse_policy(
        "h2o+layers(pyramid,beta=8)+heads(adaptive,floor=0.5)+prompt(300)+protect(values=0.02)+edges(1)"
    )
    assert policy.layers == Layers(kind="pyramid", beta=8.0)
    assert policy.heads == Heads(kind="adaptive", floor=0.5)
    assert policy.prompt == PinnedPrompt(tokens=300)
    assert (policy.outliers, policy.edges) == (0.02, 1)
    assert parse_policy("h2o+layers(512,256,200)").layers == Layers(kind="given", budgets=(512, 256, 200))
    assert parse_policy("h2o+layers(512)").layers == Layers(kind="given", budgets=(512,))
    assert parse_policy("h2o+prompt(inside)").prompt == PinnedPrompt(inside=True)
    plain = parse_policy("h2o")
    assert (plain.prompt, plain.outliers, plain.edges) == (None, 0.0, 0)
    assert parse_policy(" h2o + layers( 512 , 256 )\n+ prompt( inside ) ") == parse_policy(
        "h2o+layers(512,256)+prompt(inside)"
    )


@pytest.mark.parametrize("name", SELECTIONS.names())
def test_every_selection_reads_with_its_defaults(name):
    if name == "duo":
        with pytest.raises(UserError, match=r"duo\(pattern=FILE\)"):
            parse_policy(name)
        return
    policy = parse_policy(name)
    assert (type(policy.selection), policy.text) == (SELECTIONS.get(name), name)
    assert hash(policy) == hash(parse_policy(f"{name}()"))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("h2o+snapkv", "The policy 'h2o\\+snapkv' has two selections; give one"),
        ("h2o+h2o", "has two selections; give one"),
        ("snapkv(1024)", r"snapkv takes arguments by name, e.g. snapkv\(budget=1024\); '1024' has none"),
        ("snapkv(bugdet=1)", "Unknown argument of snapkv 'bugdet'. Did you mean 'budget'"),
        ("snapkv(layer=1)", "Unknown argument of snapkv 'layer'"),
        ("criticalkv(inner=3)", "Unknown argument of criticalkv 'inner'"),
        ("snapvk", "Unknown policy term 'snapvk'. Did you mean 'snapkv'"),
        ("snapkv(queries=1.5)", r"snapkv\(queries\) is '1.5'; it must be a whole number"),
        ("snapkv(queries=0)", r"snapkv\(queries\) is 0; .* The nearest is 1"),
        ("snapkv(kernel=4)", r"snapkv\(kernel\) is 4; it must be one of 1, 3, .* The nearest is 3"),
        ("snapkv(budget=x)", r"snapkv\(budget\) is 'x'; it must be a number"),
        ("snapkv(budget=0)", r"snapkv\(budget\) is 0; it must be a whole number of tokens, .* or a share, above 0"),
        ("snapkv(budget=1.5)", r"is 1.5; it must be a whole number of tokens, e.g. 1024, or a share, above 0 to 1.0"),
        ("snapkv(budget=0.0)", "is 0.0; it must be a whole number"),
        ("snapkv(budget=-5)", "is -5.0; it must be a whole number"),
        ("snapkv(budget=nan)", "is nan; it must be a whole number"),
        ("snapkv(budget=9999999999)", "is 9999999999; it must be a whole number"),
        (
            "snapkv(budget=131)",
            r"131 tokens is smaller than .* exact\(sinks=4,window=128\) takes 132 .* Give at least 132",
        ),
        ("snapkv+exact(window=3000)", "A budget of 2048 tokens is smaller than what is protected: .* at least 3004"),
        ("snapkv+layers(512,100)", "A budget of 100 tokens is smaller than what is protected"),
        (
            "int8+layers(pyramid)",
            r"has layers\(...\) and no selection, .* add one, e.g. snapkv\(budget=1024\), or leave",
        ),
        ("int8+heads(adaptive)", r"has heads\(...\) and no selection"),
        ("full+prompt(inside)", r"has prompt\(...\) and no selection"),
        ("full+protect(values=0.1)", r"has protect\(...\) and no selection"),
        ("layers(pyramid)", "names no codec and no selection"),
        ("h2o+layers()", r"layers takes uniform, pyramid or a budget for each layer, e.g. layers\(512,256,256,128\)"),
        ("h2o+layers(given)", "layers takes uniform, pyramid or a budget for each layer"),
        ("h2o+layers(512,x)", "layers takes uniform, pyramid or a budget for each layer"),
        ("h2o+layers(512,-1)", "layers takes uniform, pyramid or a budget for each layer"),
        ("h2o+layers(512,256,beta=3)", "layers takes uniform, pyramid or a budget for each layer"),
        ("h2o+layers(pyramyd)", "is pyramyd; it must be one of uniform, pyramid. The nearest is pyramid"),
        ("h2o+layers(512.5)", "is 512.5; it must be one of uniform, pyramid"),
        ("h2o+layers(uniform,beta=3)", r"Unknown argument of layers\(uniform\) 'beta'. Known: none"),
        ("h2o+layers(pyramid,alpha=3)", "Unknown argument of layers 'alpha'. Known: beta"),
        ("h2o+layers(pyramid,beta=0.5)", r"layers\(beta\) is 0.5; it must be at least 1.0 .* The nearest is 1.0"),
        ("h2o+layers(pyramid,beta=x)", r"layers\(beta\) is 'x'; it must be a number"),
        ("h2o+layers(pyramid)+layers(uniform)", "has layers twice; give it once"),
        ("h2o+heads()", r"heads takes uniform or adaptive, e.g. heads\(adaptive,floor=0.2\)"),
        ("h2o+heads(adaptive,0.2)", "heads takes uniform or adaptive"),
        ("h2o+heads(adaptve)", "is adaptve; it must be one of uniform, adaptive. The nearest is adaptive"),
        ("h2o+heads(uniform,floor=0.1)", r"Unknown argument of heads\(uniform\) 'floor'"),
        ("h2o+heads(adaptive,floor=2)", r"heads\(floor\) is 2.0; it must be at least 0.0 and at most 1.0"),
        ("h2o+heads(adaptive,floor=x)", r"heads\(floor\) is 'x'; it must be a number"),
        *[
            (f"h2o+prompt({inside})", r"prompt takes the longest prompt .* prompt\(2048\), or prompt\(inside\)")
            for inside in ("", "0", "-1", "1.5", "outside", "inside,100", "100,200", "tokens=5")
        ],
        ("h2o+protect()", r"protect takes the share of a budget .* protect\(values=0.01\)"),
        ("h2o+protect(0.1)", "protect takes the share of a budget"),
        ("h2o+protect(values=0.1,keys=0.1)", "protect takes the share of a budget"),
        ("h2o+protect(values=2)", r"protect\(values\) is 2.0; it must be at least 0.0 and at most 1.0"),
        ("h2o+protect(values=x)", r"protect\(values\) is 'x'; it must be a number"),
        *[
            (f"quest+{term}", "keeps all tokens and chooses what is read: leave out layers, heads, prompt and protect")
            for term in ("heads(adaptive)", "layers(pyramid)", "layers(512,512)", "prompt(9)", "protect(values=0.1)")
        ],
        ("quest(page=24)", r"exact\(round\) is 128; .* multiple of 24. The nearest is 120"),
        ("quest(page=1)+kivi", r"quest\(page\) is 1; where 32 tokens share scales it must be a mult.* divisor above 1"),
        ("quest(page=24)+kivi+exact(round=96)", r"quest\(page\) is 24; where 32 tokens share scales it must be a mult"),
        ("snapkv+exact(round=12)", r"exact\(round\) is 12; .* multiple of 8. The nearest is 16"),
        ("snapkv+kivi(group=64)+exact(round=32)", r"exact\(round\) is 32; .* multiple of 64. The nearest is 64"),
        *[
            (
                f"triattention(mode={mode})+{term}",
                rf"layers agree .* cannot have {shown}: leave it out, .* \(mode=layer\)",
            )
            for mode in ("head", "union")
            for term, shown in (
                ("heads(adaptive)", r"heads\(adaptive\)"),
                ("layers(pyramid)", "layers"),
                ("layers(512,512)", "layers"),
                ("edges(1)", "edges"),
            )
        ],
        ("triattention(mode=heads)", r"triattention\(mode\) is heads; .* The nearest is head"),
        ("kvzip+edges(1)", "reads the prompt twice needs all layers: leave out edges"),
        ("adakv+lowrank(rank=8,heads=2)", r"this codec of keys joins heads .*: use heads\(uniform\), or .* heads=1"),
        ("h2o+heads(adaptive)+value(lowrank,rank=8,heads=2)", "this codec of values joins heads"),
        ("adakv+kivi(rope=pre,mean=calibrated)", "this codec of keys joins heads or turns keys .* rope=post"),
        ("adakv+lowrank(rank=8,rope=pre)", "this codec of keys joins heads or turns keys"),
        ("key(snapkv)", "Unknown codec 'snapkv'"),
    ],
)
def test_selections_that_cannot_be_are_refused_with_the_way_out(wrong, message):
    with pytest.raises(UserError, match=message) as caught:
        parse_policy(wrong)
    assert "\n" not in str(caught.value)


def test_pairs_that_look_alike_but_can_be():
    """Keys from before RoPE without a mean in a pool; edges with layers of one's own; what quest has by default."""
    for text in (
        "adakv+kivi(rope=pre)",
        "adakv+lowrank(rank=8)",
        "adakv+heads(uniform)+lowrank(rank=8,heads=2)",
        "adakv+key(int4)+value(lowrank,rank=8,rope=pre)",
        "triattention(mode=layer)+heads(adaptive)+layers(pyramid)+edges(1)",
        "triattention(mode=head)+prompt(inside)",
        "quest+heads(uniform)+layers(uniform)+int4+edges(1)",
        "h2o+layers(0,512,512,0)+edges(1)",
        "kvzip+heads(adaptive)+layers(pyramid)",
    ):
        assert parse_policy(text).text == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("quest+key(lowrank,rank=16,heads=2)", "pages of its own"),
        ("triattention(mode=head)+protect(values=0.05)", "cannot have protect"),
        ("criticalkv(epsilon=nan)", "epsilon"),
    ],
)
def test_terms_that_would_mix_up_tokens_are_refused(text, message):
    with pytest.raises(UserError, match=message) as caught:
        parse_policy(text)
    assert "\n" not in str(caught.value)


def test_a_pattern_that_is_a_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match="no head-pattern file"):
        parse_policy(f"duo(pattern={tmp_path})")
