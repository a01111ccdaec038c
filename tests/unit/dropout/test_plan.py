"""Plans: text, mappings and files that mean the same, and what cannot be meant."""

from __future__ import annotations

from pathlib import Path

import pytest

from twodice.dropout.plan import DropoutPlan, Entry, Layers
from twodice.dropout.schedules import Constant, Early
from twodice.errors import ConfigError

TEXTS = [
    "none",
    "residual=0.1",
    "embedding=0.1, attention=0.1, residual=0.1",
    "residual.attention=0.1, residual.mlp[0:6]=linear(0.2, 0.0)",
    "attention[2]=early(0.1, 0.3), attention[3:]=late(0.1, 100)",
    "attention[-1]=0.25, output=0.0",
    "dropout.encoder.0=0.5, dropout.decoder=1.0",
]


@pytest.mark.parametrize("text", TEXTS)
def test_text_of_a_plan_parses_to_an_equal_plan(text: str) -> None:
    plan = DropoutPlan.parse(text)
    assert DropoutPlan.parse(str(plan)) == plan
    assert hash(DropoutPlan.parse(str(plan))) == hash(plan)


def test_order_and_blanks_mean_nothing() -> None:
    assert DropoutPlan.parse("a=1".replace("a", "output")) == DropoutPlan.parse(" output = 1.0 , ")
    assert DropoutPlan.parse("residual=0.1,embedding=.1") == DropoutPlan.parse("embedding=0.1, residual=0.1")


def test_the_empty_plan_is_legal_and_false() -> None:
    assert not DropoutPlan.parse("") and DropoutPlan.parse("None") == DropoutPlan()
    assert str(DropoutPlan()) == "none"


def test_mapping_objects_and_text_agree() -> None:
    text = DropoutPlan.parse("residual.mlp[0:6]=0.1, attention=early(0.1, 0.3)")
    assert DropoutPlan.parse({"residual.mlp[0:6]": 0.1, "attention": "early(0.1, 0.3)"}) == text
    assert DropoutPlan.parse({"residual": {"mlp[0:6]": 0.1}, "attention": Early(0.1, 0.3)}) == text
    assert (
        DropoutPlan(
            (Entry("residual", Constant(0.1), "mlp", Layers(0, 6)), Entry("attention", Early(0.1, 0.3)))
        )
        == text
    )


@pytest.mark.parametrize("table", ["", "[dropout]\n"])
def test_a_toml_file_is_a_plan(table: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.toml"
    path.write_text(f'{table}embedding = 0.1\nresidual.mlp = "early(0.1, 0.3)"\n"attention[0:2]" = 0.2\n')
    wanted = DropoutPlan.parse("embedding=0.1, residual.mlp=early(0.1, 0.3), attention[0:2]=0.2")
    assert DropoutPlan.parse(path) == wanted == DropoutPlan.parse(str(path))


def test_errors_of_a_file_name_it(tmp_path: Path) -> None:
    path = tmp_path / "plan.toml"
    with pytest.raises(ConfigError, match="cannot read"):
        DropoutPlan.parse(path)
    path.write_text("embedding = = 1")
    with pytest.raises(ConfigError, match="must be TOML"):
        DropoutPlan.parse(path)
    path.write_text("embeding = 0.1")
    with pytest.raises(ConfigError, match=r"did you mean 'embedding'.*plan\.toml"):
        DropoutPlan.parse(path)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("residal=0.1", "did you mean 'residual'"),
        ("residual.mpl=0.1", "did you mean 'mlp'"),
        ("embedding.wte=0.1", "no places"),
        ("embedding[1]=0.1", "does not belong to a layer"),
        ("residual=1.2", r"in \[0, 1\]; got 1.2 \(at 'residual'\)"),
        ("residual=-0.1", r"in \[0, 1\]"),
        ("residual=nan", r"in \[0, 1\]; got nan"),
        ("residual=1", "^p must be below 1 at 'residual', because .*; got 1.0; write a lower"),
        ("residual.mlp[2]=1.0", "below 1"),
        ("output=1e-9", "2\\^-17"),
        ("output=0.9999999", "2\\^-17"),
        ("attention.mlp=0.1", "narrowed to self, cross, encoder, decoder; got 'mlp'"),
        ("residual.encoder.decoder=0.1", "one part and one stack"),
        ("residual:featrue=0.1", "made of unit.*did you mean"),
        ("residual:feature+feature=0.1", "each word once"),
        ("residual:block(0)=0.1", "1 to 8388608"),
        ("residual:gaussian=1", "below 1"),
        ("output:gaussian=1", "Gaussian"),
        ("skip=1", "below 1"),
        ("attention:gaussian=0.1", "no noise of another form"),
        ("layer:feature=0.1", "takes example or batch"),
        ("embedding=depth(0.0, 0.1)", "no profile over layers"),
        ("residual=depth(0.0, depth(0.1, 0.2))", "in time"),
        ("residual=layers(0.0, 1.0)", "below 1"),
        ("residual=depth(0.0, 1.0)", "below 1"),
        ("residual:gaussian=linear(0.5, 1.0)", "stay below 1"),
        ("mlp=0.1", "write residual.mlp or skip.mlp"),
        ("cross=0.1", "attention.cross or key.cross"),
        ("residual", "kind=rate"),
        ("residual=", "kind=rate"),
        ("residual=0.1 embedding=0.1", "number"),
        ("residual=early(0.1, 0.2", "brackets"),
        ("residual=0.1)", "brackets"),
        ("attention[]=0.1", "layers must read"),
        ("attention[1 2]=0.1", "layers must read"),
        ("attention[3:3]=0.1", "at least one"),
        ("re sidual=0.1", "target must read"),
        ("residual=0.1, residual=0.1", "overlap"),
        ("residual=0.1, residual.mlp=0.2", "overlap"),
        ("attention[0:3]=0.1, attention[2]=0.2", "overlap"),
        ("attention=0.1, attention[2]=0.2", "overlap"),
        ("dropout.a=0.1, dropout.a.b=0.2", "overlap"),
    ],
)
def test_what_cannot_be_meant_is_refused_with_its_place(text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        DropoutPlan.parse(text)


def test_another_type_is_refused() -> None:
    with pytest.raises(ConfigError, match="must be text"):
        DropoutPlan.parse(3)  # type: ignore[arg-type]


def test_neighbours_do_not_overlap() -> None:
    DropoutPlan.parse("attention[0:3]=0.1, attention[3:]=0.2, residual.mlp=0.1, residual.attention=0.2")
    DropoutPlan.parse("dropout.a=0.1, dropout.ab=0.2")


def test_p_of_one_is_legal_where_the_stream_survives() -> None:
    DropoutPlan.parse("output=1, attention=1, residual=linear(0.5, 1.0)")
