"""SSKD's and RepDistiller's numbers: losses, gradients and selections to 1e-9, steps through `main` to 1e-7, float64."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import GOLDEN
from golden import replay
from golden_labelled import REP_NAMES
from torch import nn

from trainers import ab, crd, ft, kd, sskd

REP = "rep_resnet32x4_resnet8x4_f64"
RUNS = ["sskd_calib_wrn402_wrn162_f64", "sskd_calib_resnet32x4_resnet8x4_f64"]


def cases(name: str) -> dict[str, dict[str, torch.Tensor]]:
    """A file's arrays by case."""
    found: dict[str, dict[str, torch.Tensor]] = {}
    for key, value in np.load(GOLDEN / "loss" / f"{name}.npz").items():
        case, _, rest = key.partition("/")
        found.setdefault(case, {})[rest] = torch.from_numpy(np.asarray(value))
    assert found
    return found


def close(ours, theirs, tolerance=1e-9):
    torch.testing.assert_close(ours, theirs.to(ours).view_as(ours), rtol=tolerance, atol=tolerance)


def settings(g: dict) -> dict[str, float]:
    names = {"kd_temperature": "kd_T", "lt_temperature": "tf_T", "ss_temperature": "ss_T"}
    names |= {"lt_keep": "ratio_tf", "ss_keep": "ratio_ss"}
    return {ours: g[f"arg_{theirs}"].item() for ours, theirs in names.items()}


def weighted(g: dict, losses) -> torch.Tensor:
    return sum(g[f"arg_{n}_weight"].item() * loss for n, loss in zip(("ce", "kd", "tf", "ss"), losses, strict=True))


SSKD = cases("sskd_student")


def test_every_recorded_trajectory_is_replayed():
    recorded = {p.stem for pattern in ("sskd_*.npz", "rep_*.npz") for p in (GOLDEN / "steps").glob(pattern)}
    assert recorded == {*RUNS, REP}
    methods = {key.split("/")[0] for key in np.load(GOLDEN / "steps" / f"{REP}.npz") if key.endswith("/flags")}
    ours = {REP_NAMES.get(method, method) for method in (*kd.METHODS, "ab", "ft", "crd")} | {"crd+kd"}
    assert methods - ours == {"correlation", "fsp", "nst"} and ours <= methods  # not in SSKD's table


@pytest.mark.parametrize("case", SSKD)
def test_sskd_losses_and_gradients_are_the_authors(case):
    g = SSKD[case]
    logits, rep = (g[k].clone().requires_grad_() for k in ("logits_s", "feat_s"))
    teacher = [g[k].clone().requires_grad_() for k in ("logits_t", "feat_t")]
    losses = sskd.sskd_losses(logits, teacher[0], rep, teacher[1], g["target"], **settings(g))
    empty = not len(g["index_tf"])
    assert empty == (case == "case6_empty_tf") and bool(g["loss3"].isnan()) == empty
    for number, loss in enumerate(losses, start=1):
        theirs = g[f"loss{number}"]
        close(loss, torch.zeros_like(loss) if number == 3 and empty else theirs)  # D2
        wanted = {"logits": logits, "feat": rep}["feat" if number == 4 else "logits"]
        grad = g[f"loss{number}_grad_{'feat' if number == 4 else 'logits'}_s"]
        close(
            torch.autograd.grad(loss, wanted, retain_graph=True)[0],
            torch.zeros_like(wanted) if number == 3 and empty else grad,
        )
    total = weighted(g, losses)
    grads = torch.autograd.grad(total, [logits, rep, *teacher], allow_unused=True)
    assert grads[2:] == (None, None), "the teacher learns nothing"
    if not empty:
        close(total, g["loss"])
        close(grads[0], g["grad_logits_s"])
        close(grads[1], g["grad_feat_s"])


@pytest.mark.parametrize("case", SSKD)
def test_sskd_ranks_and_selections_are_the_authors(case):
    g = SSKD[case]
    similar, own = sskd.similarity(g["feat_t"])
    close(similar, g["simi_t"])
    turned = sskd.split_views(g["logits_t"])[1]
    scores = (turned / g["arg_tf_T"]).softmax(1), similar
    for kind, score, true in zip(("tf", "ss"), scores, (g["target"].repeat_interleave(3), own), strict=True):
        rank = sskd.true_rank(score, true)
        assert torch.equal(rank, g[f"rank_{kind}"])
        kept = sskd.selected(rank, g[f"arg_ratio_{kind}"].item())
        assert torch.equal(kept.nonzero()[:, 0], g[f"index_{kind}"])


def test_a_share_of_the_wrong_rows_is_rounded_down_as_the_authors_do():
    rank = torch.tensor([3, 0, 1, 2, 2, 0, 5, 1])  # wrong, the least wrong first: 2, 7, 3, 4, 0, 6
    for keep, rows in (
        (0.0, []),
        (0.5, [2, 7, 3]),
        (0.7, [2, 7, 3, 4]),
        (0.99, [2, 7, 3, 4, 0]),
        (1.0, [2, 7, 3, 4, 0, 6]),
    ):
        assert sskd.selected(rank, keep).nonzero()[:, 0].tolist() == sorted([1, 5, *rows]), keep
    assert not sskd.selected(torch.ones(4, dtype=torch.long), 0.0).any()
    assert sskd.selected(torch.full((100,), 7), 0.29).sum() == int(100 * 0.29) == 28


def test_sskd_with_its_heads_is_the_authors():
    (g,) = cases("sskd_student_with_head").values()

    def wrapper(side: str) -> nn.ModuleDict:
        net = nn.ModuleDict({"backbone": nn.ModuleDict({"fc": nn.Linear(24, 10)}), "proj_head": sskd.create_head(24)})
        net.double().load_state_dict({k[8:]: v for k, v in g.items() if k.startswith(f"{side}_param/")})
        return net

    student, teacher = wrapper("s"), wrapper("t")
    pooled = g["pooled_s"].clone().requires_grad_()
    with torch.no_grad():
        t = teacher["backbone"]["fc"](g["pooled_t"]), teacher["proj_head"](g["pooled_t"])
    logits, rep = student["backbone"]["fc"](pooled), student["proj_head"](pooled)
    losses = sskd.sskd_losses(logits, t[0], rep, t[1], g["target"], **settings(g))
    total = weighted(g, losses)
    close(total, g["loss"])
    names, params = zip(*student.named_parameters(), strict=True)
    grads = torch.autograd.grad(total, [pooled, *params])
    close(grads[0], g["grad_pooled_s"])
    for name, grad in zip(names, grads[1:], strict=True):
        close(grad, g[f"s_grad/{name}"])


def test_ssp_loss_and_gradient_are_the_authors():
    checked = 0
    for case, g in cases("sskd_ssp_head").items():
        if case.startswith("case"):
            rep = g["rep"].clone().requires_grad_()
            close(sskd.ssp_loss(rep), g["loss"])
            close(torch.autograd.grad(sskd.ssp_loss(rep), rep)[0], g["grad_rep"])
        else:
            head = sskd.create_head(24).double()
            head.load_state_dict({k[16:]: v for k, v in g.items() if k.startswith("param/proj_head.")})
            loss = sskd.ssp_loss(head(g["pooled"]))
            close(loss, g["loss"])
            for (name, _), grad in zip(
                head.named_parameters(), torch.autograd.grad(loss, head.parameters()), strict=True
            ):
                close(grad, g[f"grad/proj_head.{name}"])
        checked += 1
    assert checked == 2


def test_a_perfect_student_has_no_soft_loss():
    torch.manual_seed(0)
    logits, rep, target = torch.randn(12, 5), torch.randn(12, 8), torch.tensor([0, 4, 2])
    rates = {"kd_temperature": 4, "lt_temperature": 4, "ss_temperature": 0.5, "lt_keep": 1, "ss_keep": 0.75}
    ce, kd, lt, ss = sskd.sskd_losses(logits, logits, rep, rep, target, **rates)
    close(ce, F.cross_entropy(logits[::4], target))
    assert max(kd, lt, ss) < 1e-5


@pytest.mark.parametrize("name", RUNS)
def test_main_repeats_sskds_trajectory(name):
    path = GOLDEN / "steps" / f"{name}.npz"
    record, ours = np.load(path), replay("sskd", path)
    head_steps = len(record["ssp/loss"])
    assert head_steps == 5 and len(ours["loss"]) == 10
    np.testing.assert_allclose(ours["loss"][:head_steps], record["ssp/loss"], rtol=1e-7)
    np.testing.assert_allclose(ours["ssp_top1"], [*record["ssp/acc"], *record["student/ssp_acc"]], rtol=1e-6)
    for theirs, mine in {"loss1": "ce", "loss2": "kd", "loss3": "lt", "loss4": "ss", "loss": "loss"}.items():
        np.testing.assert_allclose(ours[mine][-5:], record[f"student/{theirs}"], rtol=1e-7, err_msg=mine)
    for part in ("ssp", "student"):
        theirs = dict(zip(record[f"{part}/names"], record[f"{part}/norms"], strict=True))
        norms = {k: v for k, v in ours["norms"][part].items() if not k.endswith("num_batches_tracked")}
        assert set(norms) == set(theirs) and len(norms) >= 4
        for key, norm in theirs.items():
            np.testing.assert_allclose(norms[key], norm, rtol=1e-7, atol=1e-10, err_msg=key)


@pytest.mark.parametrize("name", RUNS[1:])
def test_supervised_main_repeats_the_teachers_trajectory(name):
    """teacher.py of the same records, on the student's architecture."""
    path = GOLDEN / "steps" / f"{name}.npz"
    record, ours = np.load(path), replay("supervised", path)
    np.testing.assert_allclose(ours["loss"], record["vanilla/loss"], rtol=1e-7)
    for key, norm in zip(record["vanilla/names"], record["vanilla/norms"], strict=True):
        np.testing.assert_allclose(ours["norms"]["model"][key], norm, rtol=1e-7, atol=1e-10, err_msg=key)


def loaded(module: nn.Module, g: dict, prefix: str) -> nn.Module:
    """A helper in float64 with a case's recorded parameters."""
    module.double().load_state_dict(
        {k.removeprefix(prefix): v for k, v in g.items() if k.startswith(prefix)}, strict=False
    )
    assert {k for k, _ in module.named_parameters()} == {k.removeprefix(prefix) for k in g if k.startswith(prefix)}
    return module


def check_gradients(loss, g: dict, inputs: dict, module: nn.Module | None = None, prefix: str = "") -> None:
    """Gradients of the student's features and a helper's parameters, and its BatchNorm statistics after the pass."""
    names, tensors = list(inputs), list(inputs.values())
    if module is not None:
        names += [f"grad/{prefix}{n}" for n, _ in module.named_parameters()]
        tensors += list(module.parameters())
        for key in (k for k in g if k.startswith("buffer_after/")):
            close(module.get_buffer(key.removeprefix(f"buffer_after/{prefix}")).double(), g[key])
    for name, grad in zip(names, torch.autograd.grad(loss, tensors), strict=True):
        close(grad, g[name])


def features(g: dict, name: str) -> list[torch.Tensor]:
    count = len([k for k in g if k.startswith(f"{name}.")])
    assert count
    return [g[f"{name}.{i}"].clone().requires_grad_("_s" in name) for i in range(count)]


@pytest.mark.parametrize("method", ["kd", "sp", "rkd", "pkt"])
def test_losses_without_helpers_are_the_authors(method):
    kind, extra = ("logits", (4,)) if method == "kd" else ("feat", ())
    for g in cases(f"rep_{method}").values():
        student, teacher = (g[f"{kind}_{side}"].clone().requires_grad_() for side in "st")
        loss = getattr(kd, method)(student, teacher, *extra)
        close(loss, g["loss"])
        ours, none = torch.autograd.grad(loss, [student, teacher], allow_unused=True)
        close(ours, g[f"grad_{kind}_s"])
        assert none is None, "the teacher learns nothing"


def test_at_is_the_authors():
    for g in cases("rep_at").values():
        student, teacher = features(g, "feat_s"), features(g, "feat_t")
        losses = [kd.at(s, t) for s, t in zip(student, teacher, strict=True)]
        for i, loss in enumerate(losses):
            close(loss, g[f"loss_group.{i}"])
        close(sum(losses), g["loss"])
        check_gradients(sum(losses), g, {f"grad_feat_s.{i}": s for i, s in enumerate(student)})


@pytest.mark.parametrize("case", cases("rep_hint"))
def test_fitnet_is_the_authors(case):
    g = cases("rep_hint")[case]
    student = g["feat_s"].clone().requires_grad_()
    shapes = (tuple(g[f"feat_{side}"].shape[1:]) for side in "st")
    regressor = loaded(kd.MapRegressor(*shapes, relu=True), g, "param/regress.")
    regressed = regressor(student)
    close(regressed, g["regressed"])
    loss = kd.fitnet(regressed, g["feat_t"])
    close(loss, g["loss"])
    check_gradients(loss, g, {"grad_feat_s": student}, regressor, "regress.")


@pytest.mark.parametrize("case", cases("rep_vid"))
def test_vid_is_the_authors(case):
    g = cases("rep_vid")[case]
    student = g["feat_s"].clone().requires_grad_()
    gaussian = kd.GaussianRegressor(student.shape[1], g["feat_t"].shape[1])
    start = nn.functional.softplus(gaussian.log_scale.detach().double()) + 1e-5
    close(start, torch.full_like(start, 5.0), 1e-5)
    loaded(gaussian, g, "param/vid.")
    loss = kd.vid(*gaussian(*kd.same_size(student, g["feat_t"])))
    close(loss, g["loss"])
    check_gradients(loss, g, {"grad_feat_s": student}, gaussian, "vid.")


@pytest.mark.parametrize("case", cases("rep_ab"))
def test_ab_is_the_authors(case):
    g = cases("rep_ab")[case]
    student, teacher = features(g, "feat_s"), features(g, "feat_t")
    connectors = nn.ModuleDict({"connectors": nn.ModuleList()})
    for s, t in zip(student, teacher, strict=True):
        same = s.shape == t.shape
        connectors["connectors"].append(
            nn.Identity() if same else ab.MapRegressor(tuple(s.shape[1:]), tuple(t.shape[1:]), relu=False)
        )
    loaded(connectors, g, "param/connector.")
    connected = [connect(s) for connect, s in zip(connectors["connectors"], student, strict=True)]
    for i, ours in enumerate(connected):
        close(ours, g[f"connected.{i}"])
        before = ab.ab(connected[:i], teacher[:i]) / 2 ** (len(connected) - i) if i else 0
        alone = ab.ab(connected[: i + 1], teacher[: i + 1]) / 2 ** (len(connected) - 1 - i) - before
        close(alone, g[f"loss_group.{i}"])
    loss = ab.ab(connected, teacher)
    close(loss, g["loss"])
    check_gradients(loss, g, {f"grad_feat_s.{i}": s for i, s in enumerate(student)}, connectors, "connector.")


@pytest.mark.parametrize("case", cases("rep_ft"))
def test_ft_is_the_authors(case):
    g = cases("rep_ft")[case]
    student, (c_s, c_t) = g["feat_s"].clone().requires_grad_(), (g[f"feat_{side}"].shape[1] for side in "st")
    shapes = [[(3, 8, 8), (c, 4, 4), (c,)] for c in (c_s, c_t)]
    beside, paraphraser = ft.create_helper(*shapes), ft.Paraphraser(c_t)
    encoder, decoder = paraphraser.encoder, paraphraser.decoder
    loaded(paraphraser, g, "param/paraphraser.")
    factor = encoder(g["feat_t"])
    close(factor, g["factor_t"])
    reconstruction = decoder(factor)
    close(reconstruction, g["reconstruction"])
    loss = nn.functional.mse_loss(reconstruction, g["feat_t"])
    close(loss, g["loss_init"])
    for (name, _), grad in zip(
        paraphraser.named_parameters(), torch.autograd.grad(loss, paraphraser.parameters()), strict=True
    ):
        close(grad, g[f"grad_init/paraphraser.{name}"])
    translator = loaded(beside["translator"], g, "param/translator.encoder.")
    close(translated := translator(student), g["factor_s"])
    loss = ft.ft(translated, factor.detach())
    close(loss, g["loss"])
    check_gradients(loss, g, {"grad_feat_s": student}, translator, "translator.encoder.")


def test_crd_and_its_memories_are_the_authors(monkeypatch):
    (g,) = cases("rep_crd").values()
    initial = iter((g["memory_v1_init"], g["memory_v2_init"]))
    monkeypatch.setattr(crd, "initial_memory", lambda *_: next(initial).clone())
    memory = crd.Memory(g["n_data"].item(), 12)
    memory.constants = memory.constants.double()
    embed_s, embed_t = (
        loaded(crd.UnitEmbedding(width, 12), g, f"param/crd.{name}.")
        for name, width in (("embed_s", 16), ("embed_t", 24))
    )
    for step in range(3):
        now = {k.removeprefix(f"step{step}_"): v for k, v in g.items() if k.startswith(f"step{step}_")}
        student = now["feat_s"].clone().requires_grad_()
        pair = embed_s(student), embed_t(now["feat_t"])
        candidates = now["contrast_idx"]
        assert torch.equal(candidates[:, 0], now["index"])
        probabilities = memory(*pair, candidates, g["nce_t"].item(), first=step == 0)
        loss = crd.crd(*probabilities, g["n_data"].item())
        close(loss, g[f"loss_step{step}"])
        modules = nn.ModuleDict({"embed_s": embed_s, "embed_t": embed_t})
        check_gradients(loss, now, {"grad_feat_s": student}, modules, "crd.")
        memory.update(now["index"], *pair, g["nce_m"].item())
        close(memory.student, now["memory_v1"])
        close(memory.teacher, now["memory_v2"])
        close(memory.constants, now["params_buffer"][2:4])


@pytest.mark.parametrize("method", [*kd.METHODS, "ab", "ft", "crd", "crd+kd"])
def test_main_repeats_repdistillers_trajectory(method):
    path = GOLDEN / "steps" / f"{REP}.npz"
    trainer, flags = ("kd", {"method": method}) if method in kd.METHODS else (method.partition("+")[0], {})
    flags |= {"kd_weight": 1.0} if method == "crd+kd" else {}
    record, ours = np.load(path), replay(trainer, path, **flags)
    key = REP_NAMES.get(method, method)
    init = len(record[f"{key}/init_loss"])
    assert (init == 2) == (method in ("ab", "ft")) and len(ours["loss"]) == init + 3
    np.testing.assert_allclose(ours["loss"], [*record[f"{key}/init_loss"], *record[f"{key}/loss"]], rtol=1e-7)
    for theirs, mine in (("loss_cls", "ce"), ("loss_div", "kd")):
        np.testing.assert_allclose(ours[mine], record[f"{key}/{theirs}"], rtol=1e-7, err_msg=mine)
    checked = 0
    for norms in (k for k in record if k.startswith(f"{key}/") and k.endswith("/norms") and "/after_init/" not in k):
        part = norms.split("/")[1]
        for name, norm in zip(record[f"{key}/{part}/names"], record[norms], strict=True):
            np.testing.assert_allclose(
                ours["norms"][part][name], norm, rtol=1e-7, atol=1e-10, err_msg=f"{part} {name}"
            )
            checked += 1
    assert checked >= 52
    if method == "crd":
        np.testing.assert_allclose(ours["memory"]["student"], record["crd/memory_v1"], rtol=1e-7, atol=1e-10)
        np.testing.assert_allclose(ours["memory"]["teacher"], record["crd/memory_v2"], rtol=1e-7, atol=1e-10)
        np.testing.assert_allclose(ours["memory"]["constants"], record["crd/params_buffer"][2:4], rtol=1e-7)
