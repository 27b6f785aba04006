"""The report: one file that loads nothing, says what the tables say, and escapes whatever users call things."""

from __future__ import annotations

import base64
import re
from html.parser import HTMLParser
from typing import TYPE_CHECKING, Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from scperturbdiff import PerturbDiff, baselines, evaluate, report, splits
from scperturbdiff.data import log_normalize

if TYPE_CHECKING:
    from pathlib import Path

    from scperturbdiff.reporting import Report

KEYS: dict[str, Any] = {"perturbation_key": "perturbation", "control": "control", "context_keys": ["cell_type"]}
METRICS = ["energy_distance", "pearson_delta", "de_auprc"]
EMPTY = {"meta", "link", "img", "br"}
HOSTILE = [
    "<script>alert('x')</script>",
    '"><img src=x onerror=alert(1)>',
    "a|b`c`*d*_e_ & $x^{ # </td>",
    "[click](javascript:alert(1)) -- \\",
]


class Page(HTMLParser):
    """Tags with their attributes, and the text; raises where tags are not closed in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in EMPTY:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]

    def check_alone(self) -> None:
        """Nothing runs, and nothing is loaded from elsewhere."""
        assert not {"script", "iframe", "object", "embed", "form", "base"} & {tag for tag, _ in self.tags}
        for tag, attributes in self.tags:
            assert not [name for name in attributes if name.startswith("on")]
            for name in ("src", "href", "action", "poster", "srcset"):
                assert (attributes.get(name) or "data:").startswith("data:"), (tag, attributes)
        policy = next(a["content"] for a in self.named("meta") if a.get("http-equiv") == "Content-Security-Policy")
        assert policy is not None and policy.startswith("default-src 'none'")


def test_the_page_stands_alone(made: dict[str, Any]) -> None:
    page = Page(made["report"].to_html())
    page.check_alone()
    pictures = [attributes["src"] for attributes in page.named("img")]
    assert len(pictures) == 2 * 4, "populations and shifts of each condition"
    for picture in pictures:
        data = base64.b64decode(str(picture).removeprefix("data:image/png;base64,"))
        assert data.startswith(b"\x89PNG") and len(data) > 1000
    assert all(attributes["alt"] for attributes in page.named("img"))
    assert ["open" in attributes for attributes in page.named("details")] == [True, False, False, False]
    viewport = [a for a in page.named("meta") if a.get("name") == "viewport"]
    assert viewport and "max-width: 100%" in page.text, "figures fit narrow screens"


def test_it_says_what_the_tables_say(made: dict[str, Any]) -> None:
    found: Report = made["report"]
    table, summary = found.table, found.summary
    assert table is not None and summary is not None
    energy = table[table["metric"] == "energy_distance"].pivot(
        index=["cell_type", "perturbation"], columns="model", values="value"
    )
    floor = summary.loc[summary["metric"] == "energy_distance", "floor"].iloc[0]
    ahead = int((energy["prediction"] < energy[floor]).sum())
    said = floor.replace("_", " ")
    assert f"best simple rule, {said}, on {ahead} of 4 conditions (energy distance)" in found.sentences[0]
    text = Page(found.to_html()).text
    row = summary[(summary["model"] == "prediction") & (summary["metric"] == "energy_distance")].iloc[0]
    assert f"{row['mean']:.3g} [{row['low']:.3g}, {row['high']:.3g}]" in text
    for value in energy["prediction"]:
        assert f"{value:.3g}" in text
    for words in (
        "scvi-tools",
        "split-half ceiling",
        "P01, cell_type=C1",
        "30",
        "scperturbdiff.report(pred, real=real",
    ):
        assert words in text, words


def test_it_says_what_the_model_found(made: dict[str, Any], trained_model: PerturbDiff) -> None:
    found: Report = made["report"]
    assert trained_model.report_ is not None
    weight = trained_model.report_.network_weight
    assert ("the network is not used" if weight == 0 else f"weight {weight:g}") in found.sentences[1]
    assert "a condition of training" in found.sentences[1]
    text = Page(found.to_html()).text
    assert "Training leaves" in text and "controls that match on every key" in text
    # most of it is known without the model, from the cells
    alone = report(made["pred"], path=None, controls=made["controls"])
    assert alone.sentences[1] == found.sentences[1]


def test_the_same_call_gives_the_same_file(made: dict[str, Any]) -> None:
    twice = [report(made["pred"], path=None, controls=made["controls"]).to_html() for _ in range(2)]
    assert twice[0] == twice[1]


def test_without_real_cells_it_shows_the_prediction(made: dict[str, Any]) -> None:
    found = report(made["pred"], path=None, controls=made["controls"], n_genes=4)
    assert "no real cells to compare with" in found.sentences[0] and "4 conditions" in found.sentences[0]
    page = Page(found.to_html())
    page.check_alone()
    assert len(page.named("img")) == 8 and "top gene, predicted" in page.text and "observed" not in page.text
    assert found.table is None and found.summary is None
    # the genes named are those that change most
    pred, controls = made["pred"], made["controls"]
    here = [(cells.obs["cell_type"] == "C1").to_numpy() for cells in (pred, controls)]
    asked = here[0] & (pred.obs["perturbation"] == "P01").to_numpy()
    shift = pred[asked].X.mean(axis=0).A1 - log_normalize(controls[here[1]].X).mean(axis=0).A1
    listed = re.findall(r"gene\d+", found.to_markdown().split("### P01, cell\\_type=C1")[1])[:4]
    largest = pred.var_names[np.argsort(-np.abs(shift))[:25]]
    assert len(set(listed) & set(largest)) >= 3
    bare = report(pred, path=None)
    assert "no control cells of this context" in bare.to_html() and len(Page(bare.to_html()).named("img")) == 4


def test_without_rules_it_says_so(made: dict[str, Any]) -> None:
    found = report(made["pred"], made["real"], path=None, metrics=["mse_mean"], max_conditions=1, n_splits=1)
    assert "No simple rule was compared" in found.sentences[0]
    page = Page(found.to_html())
    assert len(page.named("details")) == 1 and "1 of 4 conditions" in page.text


def test_rules_that_are_missing_are_named_with_the_reason(
    made: dict[str, Any], screen_parts: dict[str, ad.AnnData], caplog: pytest.LogCaptureFixture
) -> None:
    train = screen_parts["train"].copy()
    del train.obs["cell_type"]
    found = report(made["pred"], made["real"], None, train, None, metrics=["mse_mean"], max_conditions=0)
    assert "None of the 7 simple rules has a value" in found.sentences[0]
    text = Page(found.to_html()).text
    assert "additive: not fitted in 4 of 4 conditions." in text and "context_keys='cell_type' is not a column" in text
    assert "Baseline 'additive' has no values" in text, "what was warned of is there, too"
    assert "Baseline 'additive' has no values" in caplog.text, "and not taken from the terminal"


# ---- doubts


def _counts(names: list[str], n: int = 30, effect: float = 0.0, seed: int = 0) -> ad.AnnData:
    """Counts of controls and of perturbations called `names` in two contexts, genes with odd names."""
    rng = np.random.default_rng(seed)
    rows = [(context, name) for context in (f"ctx {HOSTILE[0]}", "B") for name in ["control", *names]]
    means = np.random.default_rng(0).gamma(2.0, 3.0, size=12)  # the same law for every seed
    blocks = [rng.poisson(means * np.exp(effect * i * (np.arange(12) % 3 == 0)), (n, 12)) for i, _ in enumerate(rows)]
    obs = pd.DataFrame([row for row in rows for _ in range(n)], columns=["cell_type", "perturbation"])
    cells = ad.AnnData(np.concatenate(blocks).astype(np.float32), obs.set_index(obs.index.astype(str)))
    cells.var_names = [f"{HOSTILE[i % 4]} {i}" for i in range(12)]
    cells.layers["counts"] = cells.X.copy()
    return cells


def test_conditions_that_are_not_to_be_trusted_are_named() -> None:
    real, pred = _counts(["A", "B"], effect=0.2), _counts(["A", "B"], effect=0.0, seed=1)
    few = (real.obs["perturbation"] == "A").to_numpy() & (real.obs["cell_type"] == "B").to_numpy()
    few &= np.cumsum(few) > 5
    found = report(pred, real[~few].copy(), path=None, **KEYS, metrics=["mse_mean"], n_splits=1, max_conditions=0)
    assert found.doubts == {"A, cell_type=B": ("5 real cells to compare with",)}
    assert found.sentences[2] == "Do not trust 1 of 4 conditions: A, cell_type=B (5 real cells to compare with)."
    worse = evaluate(pred, real, **KEYS, baselines={"no_change": real}, metrics=["mse_mean"], ceiling=False)
    found = report(pred, real, path=None, **KEYS, table=worse, max_conditions=0)
    assert len(found.doubts) == 4 and "worse than no change by mse mean" in found.sentences[2]
    assert "on 0 of 4 conditions" in found.sentences[0]


def test_a_rule_that_is_better_by_noise_is_no_reason_to_doubt() -> None:
    cells = [_counts(["A", "B", "C"], effect=0.0, seed=seed) for seed in range(3)]
    table = evaluate(cells[0], cells[1], **KEYS, baselines={"no_change": cells[2]}, metrics=["energy_distance"])
    found = report(cells[0], cells[1], path=None, **KEYS, table=table, max_conditions=0)
    wide = table.pivot(index=["cell_type", "perturbation"], columns="model", values="value")
    behind = wide["prediction"] - wide["no_change"]
    assert (behind > 0).any(), "of two draws of the same cells, now this and now that one is better"
    assert len(found.doubts) == (behind > 2 * wide["ceiling"].std()).sum() < (behind > 0).sum()


def test_a_rule_is_called_one(screen: ad.AnnData) -> None:
    rule = baselines.NoChange().fit(screen, **KEYS)
    pred = rule.predict(
        screen[(screen.obs["perturbation"] == "control").to_numpy()].copy(), ["P01"], n_cells=20, seed=0
    )
    found = report(pred, path=None, **KEYS, max_conditions=0)
    assert found.sentences[1] == "The prediction was made by a simple rule, NoChange."


def test_conditions_far_from_training_are_named(made: dict[str, Any]) -> None:
    pred = made["pred"].copy()
    asked = pred.uns["scperturbdiff"]["conditions"]
    asked["unexplained_variance"] = 0.2
    first = (asked["perturbation"] == "P01") & (asked["cell_type"] == "C1")
    asked.loc[first, "unexplained_variance"] = 0.93
    asked.loc[(asked["perturbation"] == "P02") & (asked["cell_type"] == "C2"), "unexplained_variance"] = np.nan
    found = report(pred, path=None, max_conditions=0)
    assert found.doubts["P01, cell_type=C1"] == ("far from training, which leaves 93% of the variance open",)
    assert found.doubts["P02, cell_type=C2"] == ("training knows nothing like it",)
    assert "Do not trust 2 of 4 conditions: " in found.sentences[2]


# ---- names of users


def test_names_are_text_whatever_is_in_them() -> None:
    names = HOSTILE[1:]
    real, pred = _counts(names, effect=0.3), _counts(names, effect=0.3, seed=1)
    pred.uns["scperturbdiff"] = {"predicted_as_controls": [HOSTILE[0]], "model": HOSTILE[1]}
    found = report(
        pred, real, path=None, **KEYS, separator=None, metrics=["mse_mean"], title=HOSTILE[0], n_genes=12, n_splits=1,
        command=HOSTILE[2], max_conditions=2,
    )  # fmt: skip
    page = Page(found.to_html())
    page.check_alone()
    for name in HOSTILE:
        assert name in page.text, "and nothing is lost"
    assert len(page.named("img")) == 4, "names that are broken formulas do not stop the figures"

    from markdown_it import MarkdownIt

    rendered = Page(MarkdownIt("commonmark").enable("table").render(found.to_markdown()))
    assert not {"script", "img", "a", "em"} & {tag for tag, _ in rendered.tags}
    for name in HOSTILE:
        assert " ".join(name.split()) in rendered.text, name
    assert len(rendered.named("table")) == len(page.named("table"))
    columns = len(rendered.named("th")), len(rendered.named("td"))
    assert columns == (len(page.named("th")), len(page.named("td"))), "no name opens a cell"


# ---- arguments and files


def test_predictions_of_other_tools_need_columns(made: dict[str, Any]) -> None:
    pred = _counts(["A"])
    del pred.layers["counts"]
    pred.X = log_normalize(pred.X).toarray()
    with pytest.raises(
        ValueError, match=r"perturbation_key=\.\.\. and control=\.\.\. must be given: pred does not come"
    ):
        report(pred, path=None)
    found = report(pred, path=None, **KEYS, normalized=True, max_conditions=1)
    assert "not known here" in found.sentences[1]
    groups = pred.obs.groupby(["cell_type", "perturbation"]).indices
    means = ad.AnnData(
        np.array([pred.X[rows].mean(axis=0) for rows in groups.values()]),
        pd.DataFrame(list(groups), columns=["cell_type", "perturbation"], index=[f"m{i}" for i in range(len(groups))]),
        pred.var,
    )
    found = report(means, _counts(["A"], seed=2), path=None, **KEYS, means=True, n_splits=1)
    text = Page(found.to_html()).text
    assert "2 means of 2 conditions" in text and "a mean" in text


def test_files_are_whole_and_not_replaced_by_accident(made: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "new" / "report.html"
    found = report(made["pred"], path=path, max_conditions=0)
    assert path.read_text(encoding="utf-8") == found.to_html() and [p.name for p in path.parent.iterdir()] == [
        path.name
    ]
    with pytest.raises(FileExistsError, match="already there. Pass overwrite=True"):
        report(made["pred"], path=path)
    report(made["pred"], path=path, title="another", max_conditions=0, overwrite=True)
    assert "<h1>another</h1>" in path.read_text(encoding="utf-8")
    found.save(tmp_path / "card.md")
    assert (tmp_path / "card.md").read_text(encoding="utf-8") == found.to_markdown()
    with pytest.raises(ValueError, match=r"card.pdf' must end in .html, .htm, .md"):
        found.save(tmp_path / "card.pdf")
    assert str(found) == "\n".join(found.sentences)


def test_wrong_arguments_are_named(made: dict[str, Any]) -> None:
    pred, real = made["pred"], made["real"]
    with pytest.raises(TypeError, match="pred must be an AnnData, not str"):
        report("pred.h5ad", path=None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="controls=... is for reports without real cells"):
        report(pred, real, controls=made["controls"], path=None)
    with pytest.raises(ValueError, match="'metrics' are arguments of evaluate"):
        report(pred, metrics=["mse_mean"], path=None)
    with pytest.raises(ValueError, match="table lacks .*'value'"):
        report(pred, real, path=None, table=pd.DataFrame({"model": ["x"]}))
    with pytest.raises(ValueError, match="max_conditions=-1 must be a whole number"):
        report(pred, path=None, max_conditions=-1)
    with pytest.raises(TypeError, match="overwrite='yes' must be True or False"):
        report(pred, path=None, overwrite="yes")  # type: ignore[arg-type]


def test_doses_are_part_of_conditions() -> None:
    cells = [_counts(["A"], seed=seed) for seed in (0, 1)]
    for part in cells:
        treated = (part.obs["perturbation"] != "control").to_numpy()
        part.obs["dose"] = np.where(treated, np.where(np.arange(part.n_obs) % 2, 1.0, 10.0), 0.0)
    found = report(cells[0], cells[1], path=None, **KEYS, dose_key="dose", metrics=["mse_mean"], n_splits=1)
    assert "A, cell_type=B, dose=10" in Page(found.to_html()).text
    assert found.table is not None and len(found.table[found.table["role"] == "prediction"]) == 4


def test_a_split_of_a_screen_from_start_to_end(trained_model: PerturbDiff, screen: ad.AnnData) -> None:
    """Keys come from the cells; donors, of which predictions are made one by one, are one condition."""
    split = splits.hold_out_pairs(screen, **KEYS, pairs=[("P01", "C2")])
    controls = screen[split.controls].copy()
    pred = trained_model.predict(controls, split.held_out[["perturbation", "cell_type"]], seed=1, progress=False)
    assert pred.obs["donor"].nunique() == 2
    found = report(pred, screen[split.test | split.controls].copy(), trained_model, path=None, metrics=["mse_mean"])
    assert "P01, cell_type=C2" in found.to_html() and len(found.doubts) <= 1
