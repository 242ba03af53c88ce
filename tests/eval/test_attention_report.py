"""`gda attention`: numbers, maps, the page in a browser, the picture, and errors."""

import gc
import html
import json
import math
import re
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

import gda
from gda import GDAForCausalLM
from gda.eval.attention import analysis
from gda.eval.attention.analysis import LayerAttention, attention_arrays, visit_attention
from gda.eval.attention.maps import LEVELS, SIGNED_LEVELS, MapKind, MapPlan, group_maps, pack, pooled, unpack
from gda.eval.attention.report import AttentionReport

from ..support.browser import Page, expect_text, number, opened
from ..support.commands import Command
from ..support.llamas import byte_tokenizer, llama_model, save_llama
from ..support.tiny import tiny_config, tiny_model, token_ids

pytestmark = pytest.mark.slow

LENGTH = 13
TEXT = "The cat thanked the hen, and the ant in the theatre thanked the cat."
HOSTILE = "</script><img src=x onerror=alert(1)>"
MODELS: dict[str, dict[str, Any]] = {
    "shared": {},
    "paired": {"kv_layout": "paired", "num_key_value_heads": 4},
    "tanh": {"lambda_type": "tanh"},
    "a noise head over two KV heads": {"num_attention_heads": 10, "num_key_value_heads": 4, "lambda_type": "sigmoid"},
    "sliding": {"sliding_window": 5},
}


def live_model(**changes: Any) -> GDAForCausalLM:
    """A model with the vocabulary of `byte_tokenizer` and a token-dependent λ."""
    changes = {"vocab_size": len(byte_tokenizer()), "lambda_type": "sigmoid", "num_hidden_layers": 3} | changes
    return tiny_model(tiny_config(**changes))


def save_model(folder: Path, model: GDAForCausalLM) -> Path:
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GDA model, `gda`, and a Llama with as many layers, `llama`. Tests must not change it."""
    folder = tmp_path_factory.mktemp("attention")
    save_model(folder / "gda", live_model())
    save_llama(folder / "llama", num_hidden_layers=3, num_attention_heads=6, hidden_size=48)
    return folder


@pytest.fixture(scope="module")
def report(folder: Path) -> AttentionReport:
    return gda.attention(folder / "gda", baseline=folder / "llama", text=TEXT)


# --------------------------------------------------------------------------------------------------------------- arrays


@pytest.mark.parametrize("name", MODELS)
def test_received_and_cancelled_equal_the_loops(name: str) -> None:
    model, ids = tiny_model(**MODELS[name]), token_ids(LENGTH)
    layers: list[LayerAttention] = []
    visit_attention(model, ids, layers.append)
    arrays = attention_arrays(model, ids)
    assert (arrays.num_layers, arrays.num_groups) == (2, len(layers[0].noise))  # type: ignore[arg-type]
    for maps in layers:
        received, cancelled = counted(maps)
        assert arrays.received[maps.layer] == pytest.approx(received, abs=1e-6)
        assert arrays.cancelled is not None
        assert arrays.cancelled[maps.layer] == pytest.approx(cancelled, abs=1e-6)
    assert arrays.received.sum(axis=-1) == pytest.approx(np.ones_like(arrays.received[..., 0]), abs=1e-5)


def counted(maps: LayerAttention) -> tuple[np.ndarray, np.ndarray]:
    """Received and cancelled (G, T), computed in loops over the rows from the second on."""
    assert maps.noise is not None
    assert maps.lambda_ is not None
    groups, heads = len(maps.noise), len(maps.signal) // len(maps.noise)
    received = np.zeros((groups, LENGTH))
    cancelled = np.zeros((groups, LENGTH))
    for head in range(len(maps.signal)):
        for row in range(1, LENGTH):
            for token in range(LENGTH):
                seen = maps.signal[head, row, token].item()
                taken = maps.lambda_[head, row].item() * maps.noise[head // heads, row, token].item()
                received[head // heads, token] += seen / heads / (LENGTH - 1)
                cancelled[head // heads, token] += max(0.0, min(seen, taken)) / heads / (LENGTH - 1)
    return received, cancelled


def test_arrays_of_a_llama() -> None:
    """Without noise, and with one group per KV head unless `groups` is given."""
    model, ids = llama_model(), token_ids(LENGTH)
    arrays = attention_arrays(model, ids)
    assert (arrays.noise, arrays.difference, arrays.lambda_, arrays.cancelled) == (None, None, None, None)
    assert arrays.received.shape == (2, 2, LENGTH)
    assert attention_arrays(model, ids, groups=4).num_groups == 4
    assert attention_arrays(model, ids, groups=3).num_groups == 1  # 4 heads cannot form three groups


def test_one_layer_of_maps_is_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Maps of earlier layers are freed, and `visit` gets all rows."""
    alive: list[weakref.ref[torch.Tensor]] = []
    shares = analysis.token_shares

    def counting(maps: LayerAttention, groups: int) -> Any:
        gc.collect()
        assert not [ref for ref in alive if ref() is not None]
        alive.extend(weakref.ref(tensor) for tensor in (maps.signal, maps.noise) if tensor is not None)
        return shares(maps, groups)

    monkeypatch.setattr(analysis, "token_shares", counting)
    found = gda.attention(live_model(num_hidden_layers=5), tokenizer=byte_tokenizer(), text=TEXT)
    assert len(alive) == 10
    assert found.arrays.num_layers == 5
    seen: list[int] = []
    alive.clear()
    attention_arrays(tiny_model(), token_ids(LENGTH), visit=lambda maps: seen.append(maps.signal.shape[1]))
    assert seen == [LENGTH, LENGTH]


# ----------------------------------------------------------------------------------------------------------------- maps


@pytest.mark.parametrize(("signed", "levels"), [(False, LEVELS), (True, SIGNED_LEVELS)])
def test_packed_maps_are_within_the_documented_error(signed: bool, levels: int) -> None:
    """m (q + 1/4) / n² for every value; signs and zeros are exact."""
    maps = torch.rand(3, 9, 9, generator=torch.Generator().manual_seed(0)).pow(6).tril()
    if signed:
        maps *= torch.where(torch.arange(9) % 2 == 0, 1.0, -0.3)
    kind = MapKind("difference", signed)
    kept = pack([(kind, maps)])
    scales, packed = kept.scales, kept.levels
    assert (scales.shape, packed.shape, packed.dtype) == ((3, 1), (3, 1, 45), np.uint8)
    for group in range(3):
        got = unpack(kind, float(scales[group, 0]), packed[group, 0])
        exact = maps[group].numpy()
        steps = np.round(levels * np.sqrt(np.abs(exact) / scales[group, 0]))
        assert (np.abs(got - exact) <= scales[group, 0] * (steps + 0.25) / levels**2 + 1e-7).all()
        assert (got[exact == 0] == 0).all()
        assert (np.sign(got) * np.sign(exact) >= 0).all()


@pytest.mark.parametrize("pool", [2, 3, 8])
def test_pooled_maps_are_means_over_causal_tokens(pool: int) -> None:
    maps = torch.rand(2, 7, 7).tril()
    got = pooled(maps, pool)
    size = math.ceil(7 / pool)
    assert got.shape == (2, size, size)
    for row in range(size):
        for column in range(row + 1):
            square = [
                maps[1, q, k].item()
                for q in range(row * pool, min(7, (row + 1) * pool))
                for k in range(column * pool, min(7, (column + 1) * pool))
                if k <= q
            ]
            assert got[1, row, column].item() == pytest.approx(sum(square) / len(square))


def test_plan_is_the_finest_that_fits() -> None:
    """First every head, then means over groups, then over squares of tokens; `reductions` names them."""
    big: dict[str, Any] = {"groups": 8, "heads": 4, "tokens": 512}
    plan = MapPlan.that_fits(range(40), **big, limit=36_000_000)
    assert (plan.pool, plan.heads, plan.size) == (2, False, 256)
    assert 40 * 8 * 3 * plan.values <= 36_000_000
    assert len(plan.reductions(4)) == 2
    few = MapPlan.that_fits([3, 4], **big, limit=36_000_000)
    assert (few.pool, few.heads, few.reductions(4)) == (1, True, [])
    assert [kind.name for kind in few.kinds(2, differential=True)] == [
        *("signal 0", "signal 1", "noise", "difference 0", "difference 1")
    ]
    assert MapPlan.that_fits(range(400), **big, limit=1).pool == 64


def test_kept_maps_match_the_model(report: AttentionReport, folder: Path) -> None:
    """Head by head, within the error. The baseline's are means over the heads that correspond to a group."""
    model = GDAForCausalLM.from_pretrained(folder / "gda")
    llama = LlamaForCausalLM.from_pretrained(folder / "llama")
    layers: list[LayerAttention] = []
    visit_attention(model, torch.tensor(report.token_ids), layers.append)
    visit_attention(llama, torch.tensor(report.token_ids), layers.append)
    heads = report.signal_heads_per_group
    for maps, theirs in zip(layers[:3], layers[3:], strict=True):
        assert maps.noise is not None
        kept = {**shown(report.maps[maps.layer]), **shown(report.baseline_maps[maps.layer])}
        assert list(kept) == [
            *(f"signal {i}" for i in range(3)),
            "noise",
            *(f"difference {i}" for i in range(3)),
            "baseline",
        ]
        for group in range(2):
            for head in range(heads):
                assert kept[f"signal {head}"][group] == pytest.approx(
                    maps.signal[group * heads + head].numpy(), abs=4.1e-3
                )
                exact = maps.difference[group * heads + head].numpy()
                assert kept[f"difference {head}"][group] == pytest.approx(exact, abs=8e-3)
            assert kept["noise"][group] == pytest.approx(maps.noise[group].numpy(), abs=4.1e-3)
            assert kept["baseline"][group] == pytest.approx(
                theirs.signal[3 * group : 3 * group + 3].mean(0).numpy(), abs=4.1e-3
            )
    plan = MapPlan((0,), 1, False, LENGTH)
    names = [kind.name for kind, _ in group_maps(layers[0], plan, 2)]
    assert names == ["signal", "noise", "difference"]


def shown(kept: Any) -> dict[str, list[np.ndarray]]:
    return {
        kind.name: [unpack(kind, float(kept.scales[group, index]), kept.levels[group, index]) for group in range(2)]
        for index, kind in enumerate(kept.kinds)
    }


def test_notes_list_reductions(folder: Path) -> None:
    """A cut text, averaged maps, omitted layers, and a baseline with another depth."""
    found = gda.attention(
        folder / "gda", baseline=save_llama(folder / "deep", num_hidden_layers=4), text=TEXT, max_tokens=20,
        layers=[2, 0], map_megabytes=0.001,
    )  # fmt: skip
    output = "\n".join(found.notes)
    for note in (
        "; the first 20 were read",
        "mean over the 3 signal heads",
        "mean over 2 × 2 tokens",
        "2 of 3 layers",
    ):
        assert note in output
    assert re.search(r"deep has a different number of layers than gda", output)
    assert (sorted(found.maps), found.baseline_maps, len(found.tokens)) == ([0, 2], {}, 20)
    for note in found.notes:
        assert note in found.to_html()


# ---------------------------------------------------------------------------------------------------------- the command


def test_the_command_writes_page_picture_and_json(folder: Path, tmp_path: Path, command: Command) -> None:
    pytest.importorskip("matplotlib")
    page, picture = tmp_path / "new" / "a.html", tmp_path / "a.png"
    arguments = ("attention", folder / "gda", "--baseline", folder / "llama", "--text", TEXT, "--out", page)
    outcome = command(*arguments, "--png", picture, "--json")
    assert outcome.code == 0, outcome.error
    output = json.loads(outcome.out)
    assert output == json.loads(
        json.dumps(gda.attention(folder / "gda", baseline=folder / "llama", text=TEXT).to_dict())
    )
    assert output["attention"]["lambda"]
    assert output["baseline_attention"]["noise"] is None
    assert "".join(output["tokens"]).replace("␣", " ") == TEXT
    assert output["most_cancelled"][0]["cancelled"] == max(token["cancelled"] for token in output["most_cancelled"])
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert f"wrote {page}" in outcome.error
    again = command(*arguments)
    assert again.code == 2
    assert again.error == f"gda: {page} already exists; choose another path or pass --overwrite\n"
    assert command(*arguments, "--overwrite").out.startswith(f"wrote {page} (0.")
    assert sorted(path.name for path in page.parent.iterdir()) == ["a.html"]


def test_bad_input_is_refused_first(folder: Path, tmp_path: Path, command: Command) -> None:
    """In one line, before a model runs."""
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "text.txt").write_text(TEXT)
    model, out = folder / "gda", ("--out", tmp_path / "a.html")
    cases: list[tuple[tuple[Any, ...], str]] = [
        ((model, *out), "--text"),
        ((model, "--text", "a", "--file", tmp_path / "text.txt", *out), "--text"),
        ((model, "--text", "a"), "--out"),
        ((model, "--text", "  ", *out), "empty"),
        ((model, "--text", "a\udcff", *out), "half of a surrogate pair"),
        ((model, "--file", tmp_path / "empty.txt", *out), "empty.txt"),
        ((model, "--file", tmp_path / "bytes.txt", *out), "bytes.txt"),
        ((model, "--file", tmp_path / "none.txt", *out), "none.txt"),
        ((model, "--file", tmp_path / "text.txt", "--out", tmp_path / "text.txt", "--overwrite"), "text to read"),
        ((model, "--text", "a", "--out", tmp_path), "is not a file"),
        ((model, "--text", "a", "--out", tmp_path / "a.png", "--png", tmp_path / "a.png"), "--png"),
        ((model, "--text", "a", "--max-tokens", 0, *out), "--max-tokens"),
        ((model, "--text", "a", "--map-megabytes", "nan", *out), "--map-megabytes"),
        ((model, "--text", "a", "--layers", "3", *out), "--layers"),
        ((model, "--text", "a", "--layers", "x", *out), "--layers"),
        ((model, "--text", "a", "--device", "none", *out), "--device"),
        ((tmp_path / "nowhere", "--text", "a", *out), "nowhere"),
        ((model, "--text", "a", "--baseline", tmp_path / "nowhere", *out), "nowhere"),
        (("", "--text", "a", *out), "empty"),
    ]
    for arguments, named in cases:
        outcome = command("attention", *arguments)
        assert (outcome.code, outcome.out) == (2, ""), arguments
        assert len(outcome.error.splitlines()) == 1
        assert named in outcome.error
    assert (tmp_path / "text.txt").read_text() == TEXT
    assert not (tmp_path / "a.html").exists()


def test_models_that_cannot_be_compared_or_read(folder: Path, tmp_path: Path) -> None:
    """A baseline with another vocabulary, weights that are not finite, a model in memory without its tokenizer."""
    small = live_model(vocab_size=70)
    with pytest.raises(ValueError, match="one tokenizer"):
        gda.attention(folder / "gda", baseline=save_model(tmp_path / "small", small), text=TEXT)
    broken = live_model()
    with torch.no_grad():
        broken.model.layers[1].self_attn.q_proj.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="layer 1 has attention that is not finite"):
        gda.attention(broken, tokenizer=byte_tokenizer(), text=TEXT)
    with pytest.raises(ValueError, match="needs its tokenizer"):
        gda.attention(broken, text=TEXT)


def test_model_that_peft_wraps() -> None:
    """The attention with its adapter, which at first changes nothing."""
    peft = pytest.importorskip("peft")
    model, tokenizer = live_model(), byte_tokenizer()
    expected = gda.attention(model, tokenizer=tokenizer, text=TEXT).to_dict()["attention"]
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    assert gda.attention(wrapped, tokenizer=tokenizer, text=TEXT).to_dict()["attention"] == expected
    with torch.no_grad():
        wrapped.base_model.model.model.layers[0].self_attn.q_proj.lora_B.default.weight.fill_(1.0)
    assert gda.attention(wrapped, tokenizer=tokenizer, text=TEXT).to_dict()["attention"] != expected


def test_token_labels(folder: Path) -> None:
    """Visible spaces and line ends, pieces for parts of a character, numbers for control characters."""
    found = gda.attention(folder / "gda", text="the hen\n€\u202e")
    assert "".join(found.tokens).startswith("the␣hen↵")
    assert all(token.isprintable() and token for token in found.tokens)


# ------------------------------------------------------------------------------------------------------------- the page


def test_a_notebook_shows_the_page(report: AttentionReport) -> None:
    """The report itself prints as one line."""
    assert (
        repr(report)
        == f"<AttentionReport of gda, baseline llama: {len(report.token_ids)} tokens, 3 layers of 2 groups>"
    )
    frame = report._repr_html_()
    assert frame.startswith("<iframe srcdoc=")
    assert html.escape(report.to_html()) in frame


def test_page_in_a_frame_of_a_notebook(report: AttentionReport, tmp_path: Path) -> None:
    """It has no address of its own there."""
    path = tmp_path / "notebook.html"
    path.write_text(f"<!doctype html><meta charset=utf-8>{report._repr_html_()}")
    with opened(path, ready="iframe") as page:
        frame = page.frame_locator("iframe")
        frame.locator("body[data-ready]").wait_for()
        assert frame.locator("canvas").count() > 0


def test_page_fetches_nothing_and_runs_only_its_script(report: AttentionReport) -> None:
    text = report.to_html()
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', text)
    assert policy.startswith("default-src &#39;none&#39;")
    assert "unsafe" not in policy
    assert "http" not in policy
    page = Page(text)
    assert page.addresses == []
    assert page.tags.count("script") == 2 + report.arrays.num_layers
    assert "prefers-color-scheme: dark" in text
    assert "@media print" in text


def test_page_numbers_and_keys(report: AttentionReport, tmp_path: Path) -> None:
    """Arrows move through layers and groups, and Shift + arrows through tokens; the numbers are the report's."""
    path = report.write_html(tmp_path / "report.html")
    arrays = report.arrays
    assert arrays.cancelled is not None
    shares = arrays.cancelled.sum(axis=-1)
    layer, group = (int(one) for one in np.unravel_index(int(shares.argmax()), shares.shape))
    with opened(path) as page:

        def place() -> str:
            return page.inner_text("#place")

        assert place() == f"Layer {layer}, group {group}"
        assert f"cancelled {100 * shares[layer, group]:.1f} %" in page.inner_text("#place-numbers")
        page.keyboard.press("Home")
        page.keyboard.press("ArrowLeft")
        page.keyboard.press("ArrowLeft")
        expect_text(page, "#place", "Layer 0, group 0")
        page.keyboard.press("ArrowUp")
        assert place() == "Layer 0, group 0"
        page.keyboard.press("ArrowDown")
        page.keyboard.press("ArrowRight")
        expect_text(page, "#place", "Layer 1, group 1")
        page.wait_for_selector(".panel canvas")
        page.keyboard.press("Shift+ArrowUp")  # the last row, at the first token
        page.keyboard.press("Shift+ArrowRight")
        page.keyboard.press("Shift+ArrowUp")
        row, column = len(report.tokens) - 2, 1
        assert page.inner_text("#cursor") == (
            f"{row} “{report.tokens[row]}” looks at {column} “{report.tokens[column]}”"
        )
        captions = page.eval_on_selector_all(".panel", "all => all.map(one => [one.dataset.map, one.innerText])")
        kept = {**shown(report.maps[1]), **shown(report.baseline_maps[1])}
        assert [name for name, _ in captions] == list(kept)
        for name, caption in captions:
            value, error = caption.replace("\n", " ").split(" ± ")
            assert number(value.split()[-1]) == pytest.approx(kept[name][1][row, column], abs=number(error))
            assert number(error) > 0
        rows = page.eval_on_selector_all(
            "#numbers tbody tr", "all => all.map(row => [...row.cells].map(c => c.textContent))"
        )
        heads = page.eval_on_selector_all("#numbers th", "all => all.map(one => one.textContent)")
        for index in range(arrays.num_layers):
            cells = dict(zip(heads, rows[index], strict=True))
            assert number(cells["entropy, difference"]) == pytest.approx(
                arrays.difference.entropy[index].mean(), abs=1e-4
            )
            assert number(cells["share on the first token, noise"]) == pytest.approx(
                arrays.noise.first_token[index].mean(), abs=1e-4
            )
            assert number(cells["share that is negative, difference"]) == pytest.approx(
                arrays.difference.negative[index].mean(), abs=1e-4
            )
            assert number(cells["λ"]) == pytest.approx(arrays.lambda_[index].mean(), abs=1e-4)
        page.keyboard.press("t")  # this layer
        page.keyboard.press("t")  # this group
        page.wait_for_selector('[data-scope="group"][aria-pressed="true"]')
        first = page.eval_on_selector("#token-table tbody tr", "row => [...row.cells].map(cell => cell.textContent)")
        most = report.most_cancelled(1, 1)[0]
        assert first[:2] == [most["token"], str(most["position"])]
        assert number(first[3]) == pytest.approx(most["cancelled"], abs=1e-4)
        page.keyboard.press("m")
        assert page.eval_on_selector("#measure", "one => one.selectedIndex") == 1
        page.keyboard.press("?")
        assert page.is_visible("#help")
        page.keyboard.press("Escape")
        assert not page.is_visible("#help")
        page.focus("#navigator")
        assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") in ("solid", "none")
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.tagName") == "SELECT"
        assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"


def test_pointer_on_maps_and_cells(report: AttentionReport, tmp_path: Path) -> None:
    with opened(report.write_html(tmp_path / "report.html")) as page:
        box = page.locator("#navigator canvas").bounding_box()
        page.mouse.click(box["x"] + box["width"] * 0.9, box["y"] + box["height"] - 6)
        expect_text(page, "#place", "Layer 2, group 1")
        page.hover(".panel canvas", position={"x": 3, "y": 3})
        assert page.inner_text("#cursor").startswith("0 “")
        page.hover("#text span:nth-child(2)")
        assert f"1 “{report.tokens[1]}”" in page.inner_text("#text-readout")


def test_page_in_light_dark_and_print(report: AttentionReport, tmp_path: Path) -> None:
    """It follows the system's colour scheme, also when it changes, and prints in light colours."""
    path = report.write_html(tmp_path / "report.html")
    corner = "[...document.querySelector('.panel canvas').getContext('2d').getImageData(200, 4, 1, 1).data].slice(0, 3)"
    with opened(path) as page:
        light = page.evaluate(corner)
        page.emulate_media(color_scheme="dark")
        for _ in range(600):  # the page hears of the change in one of the next frames
            page.evaluate("new Promise(requestAnimationFrame)")
            if (dark := page.evaluate(corner)) != light:
                break
        assert sum(dark) < sum(light)
        page.evaluate("dispatchEvent(new Event('beforeprint'))")
        assert page.evaluate(corner) == light
        page.evaluate("dispatchEvent(new Event('afterprint'))")
        assert page.evaluate(corner) == dark
    with opened(path, scheme="dark", width=420) as page:
        assert page.evaluate("document.documentElement.scrollWidth") <= 420


def test_markup_is_escaped(tmp_path: Path, command: Command) -> None:
    """In the names of the model and the text, and in the text itself."""
    name = "x " + HOSTILE.replace("/", "∕") + "<!--<script>"
    model = save_model(tmp_path / name, live_model())
    text = tmp_path / "<b onload=alert(2)>.txt"
    text.write_text(f"the {HOSTILE} \u2028<!--<script> hen")
    out = tmp_path / "a.html"
    outcome = command("attention", model, "--baseline", model, "--file", text, "--out", out)
    assert outcome.code == 0, outcome.error
    page_text = out.read_text()
    page = Page(page_text)
    assert {"img", "b"} & set(page.tags) - {"b"} == set()
    assert page.addresses == []
    with opened(out) as shown_page:  # a dialog or an error would fail
        assert name in shown_page.inner_text("h1")
        assert "img" in shown_page.inner_text("#text")
        assert shown_page.locator("img").count() == 0
        shown_page.keyboard.press("ArrowDown")
        shown_page.keyboard.press("Shift+ArrowUp")
        shown_page.hover("#text span:nth-child(5)")


def test_llama_zero_lambda_and_single_token(folder: Path, tmp_path: Path) -> None:
    """Signal maps only; noise that cancels nothing; a text of one token."""
    llama = gda.attention(folder / "llama", text=TEXT)
    assert llama.most_cancelled() == []
    by_group = llama.arrays.signal.entropy.reshape(3, 2, -1).mean(-1)  # of 3 layers and 2 KV heads
    layer, group = divmod(int(by_group.argmin()), 2)
    with opened(llama.write_html(tmp_path / "llama.html")) as page:
        assert page.inner_text("#place") == f"Layer {layer}, group {group}"  # the most concentrated attention
        assert page.locator(".panel").count() >= 1
        assert "Where attention goes" in page.inner_text("main")
    silent = live_model(lambda_type="tanh")
    for layer in silent.model.layers:
        torch.nn.init.zeros_(layer.self_attn.lambda_proj.weight)
    at_zero = gda.attention(silent, tokenizer=byte_tokenizer(), text=TEXT)
    assert at_zero.most_cancelled() == []
    with opened(at_zero.write_html(tmp_path / "zero.html")) as page:
        assert "Nothing is cancelled here" in page.inner_text("#tokens-about")
        assert page.locator("#token-table tbody tr").count() == 20
    one = gda.attention(folder / "gda", baseline=folder / "llama", text="a")
    assert one.tokens == ["a"]
    with opened(one.write_html(tmp_path / "one.html")) as page:
        page.keyboard.press("Shift+ArrowUp")
        assert page.inner_text("#cursor") == "0 “a” looks at 0 “a”"


@pytest.mark.long
def test_page_of_a_large_model(tmp_path: Path) -> None:
    """40 layers, 8 groups, 512 tokens: the page stays within its size and names what it averaged."""
    shape = {"num_hidden_layers": 40, "num_attention_heads": 40, "num_noise_heads": 8, "num_key_value_heads": 8}
    model = live_model(**shape, max_position_embeddings=512)
    found = gda.attention(model, tokenizer=byte_tokenizer(), text=TEXT * 30)
    assert (found.plan.pool, found.plan.heads) == (2, False)
    assert len(found.tokens) == 512
    path = found.write_html(tmp_path / "big.html")
    assert path.stat().st_size < 1.4 * 36_000_000
    with opened(path) as page:
        page.keyboard.press("End")
        expect_text(page, "#place", re.compile("^Layer 39"))
        page.hover(".panel canvas", position={"x": 5, "y": 100})
        assert re.match(r"\d+–\d+ “.*” looks at \d+–\d+ “", page.inner_text("#cursor"))
        assert "mean over 2 × 2 tokens" in page.inner_text("header")
