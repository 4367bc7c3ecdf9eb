"""SSKD's numbers: losses, gradients and selections to 1e-9, the authors' steps through `main` to 1e-7, in float64."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import GOLDEN
from golden import replay
from torch import nn

from trainers import sskd

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
    recorded = {p.stem for p in (GOLDEN / "steps").glob("sskd_*.npz")}
    assert recorded == set(RUNS)


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
    for part, mine in {"ssp": "ssp_head", "student": "student"}.items():
        theirs = dict(zip(record[f"{part}/names"], record[f"{part}/norms"], strict=True))
        norms = {k: v for k, v in ours["norms"][mine].items() if not k.endswith("num_batches_tracked")}
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
