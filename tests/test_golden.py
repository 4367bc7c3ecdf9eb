"""The authors' numbers: losses and gradients to 1e-9, five training steps through `main` to 1e-8, in float64."""

import dataclasses

import golden
import numpy as np
import pytest
import torch
from conftest import GOLDEN
from golden import replay
from rederived import trajectories
from tools import Largest

from common import LARS
from trainers import swav, swav_disco
from trainers.disco import consistency_loss
from trainers.disco import info_nce as disco_info_nce
from trainers.moco import hide_and_seek, info_nce, momentum_update
from trainers.rkd import attention_transfer, hard_dark_rank, rkd_angle, rkd_distance
from trainers.seed import seed_loss, warmup_schedule
from trainers.simsiam import negative_cosine
from trainers.smd import cosine_loss, smd_loss
from trainers.swav import enqueue, sinkhorn, swapped_prediction_loss, warmup_cosine

TAMER = {"base_lr": 0.05}  # some runs were recorded at a second learning rate
SIAMESE = [("simsiam", "simsiam"), ("smd", "smd_phase1_epoch0"), ("smd", "smd_phase2_epoch2")]
RUNS = [  # trainer, file, tag in the file, flags that the record states in words only
    *((trainer, name, "f64", {}) for trainer, name in SIAMESE),
    *((trainer, name, "f64_lrb16", TAMER) for trainer, name in SIAMESE),
    ("moco", "moco", "f64", {"head": "wide", "temperature": 0.1}),
    ("seed", "seed", "f64", {"base_lr": 0.03}),
    ("seed", "seed_small_patch", "f64", {"base_lr": 0.03}),
    ("disco", "disco", "f64", {"consistency_weight": 16}),  # one GPU with all 16 images
    ("rkd", "disco_rkd", "f64", {}),
    # their run with --use-mse was not recorded: without its relations it is DisCo's
    ("rkd", "disco", "f64", {"consistency": True, "consistency_weight": 16, "distance_weight": 0, "angle_weight": 0}),
]
# What the authors log and what it is of ours: theirs sum over the 16 images.
METERS = {"ce": ("info_nce", 1), "mse_q": ("consistency_1", 16), "mse_qk": ("consistency_2", 16)}


def arrays(name):
    return {k: torch.from_numpy(np.asarray(v)) for k, v in np.load(GOLDEN / "loss" / f"{name}.npz").items()}


def close(ours, theirs, tolerance=1e-9):
    torch.testing.assert_close(ours, theirs.to(ours), rtol=tolerance, atol=tolerance)


def test_every_recorded_trajectory_is_replayed():
    recorded = {(p.stem, key.split("/")[0]) for p in (GOLDEN / "steps").glob("*.npz") for key in np.load(p)}
    assert {(name, tag) for name, tag in recorded if "f64" in tag} == {(name, tag) for _, name, tag, _ in RUNS}


@pytest.mark.parametrize(
    "trainer, name, tag, flags", RUNS, ids=[f"{trainer}-{name}-{tag}" for trainer, name, tag, _ in RUNS]
)
def test_main_repeats_the_authors_trajectory(trainer, name, tag, flags):
    path = GOLDEN / "steps" / f"{name}.npz"
    record, ours = np.load(path), replay(trainer, path, **flags)
    meters = [key.split("/")[-1] for key in record if key.startswith(f"{tag}/losses/")]
    assert "loss" in meters
    for meter in meters:
        name, factor = METERS.get(meter, (meter, 1))
        theirs = record[f"{tag}/losses/{meter}"]
        np.testing.assert_allclose(factor * np.array(ours[name]), theirs, rtol=1e-8, err_msg=meter)
    np.testing.assert_allclose(ours["lr"], record[f"{tag}/lr"][:, 0], rtol=1e-12)
    theirs = dict(zip(record[f"{tag}/param_names"], record[f"{tag}/final_l2"], strict=True))
    theirs.pop("encoder.fc.6.bias", None)  # SimSiam's never-trained bias, D2
    theirs = {key: norm for key, norm in theirs.items() if not key.startswith("teacher")}  # frozen
    assert set(ours["final_l2"]) == set(theirs)
    for key, norm in theirs.items():
        np.testing.assert_allclose(ours["final_l2"][key], norm, rtol=1e-8, atol=1e-10, err_msg=key)
    fixed = ("/teacher.", "/teacher_encoder_k.")  # in eval mode, and one that nobody calls
    for key in (k for k in record if k.startswith(f"{tag}/bn/") and not any(name in k for name in fixed)):
        np.testing.assert_allclose(
            ours["buffers"][key.removeprefix(f"{tag}/bn/").replace("/", ".")], record[key], rtol=1e-8, atol=1e-10
        )
    for queue in {"queue", "small_queue"} & {key.removeprefix(f"{tag}/") for key in record}:
        np.testing.assert_allclose(ours[queue].T, record[f"{tag}/{queue}"], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("temperature", ["0.04", "0.004"])
@pytest.mark.parametrize("view", [1, 2])
def test_smd_loss_and_gradient_are_the_authors(temperature, view):
    g = {k.removeprefix("case0/"): v for k, v in arrays("smd").items()}
    student = g[f"student{view}"].clone().requires_grad_()
    loss = smd_loss(student, g[f"teacher{view}"], float(temperature))
    close(loss, g[f"tau{temperature}/view{view}/loss"])
    close(torch.autograd.grad(loss, student)[0], g[f"tau{temperature}/view{view}/grad_student"])


def test_smd_totals_are_the_authors():
    g = {k.removeprefix("case0/"): v for k, v in arrays("smd").items()}
    checked = 0
    for key in [k for k in g if k.endswith("/total_loss")]:
        tau, times, epoch = key.split("/")[:3]
        s1, s2 = (g[f"student{i}"].clone().requires_grad_() for i in (1, 2))
        cosine = (cosine_loss(s1, g["teacher1"]) + cosine_loss(s2, g["teacher2"])) / 2
        metric = sum(smd_loss(s, g[f"teacher{i}"], float(tau[3:])) for i, s in ((1, s1), (2, s2))) / 2
        total = cosine + float(times[5:]) * metric if epoch != "epoch2" else metric
        close(total, g[key])
        grads = torch.autograd.grad(total, [s1, s2])
        close(grads[0], g[f"{tau}/{times}/{epoch}/grad_student1"])
        close(grads[1], g[f"{tau}/{times}/{epoch}/grad_student2"])
        checked += 1
    assert checked == 12


def test_smd_anchor_without_negatives_only_pulls():
    """All teachers equal: no distance exceeds the student's, every image is a positive, the loss is softplus(w d / t)."""
    torch.manual_seed(0)
    s, t = torch.randn(6, 8, dtype=torch.float64, requires_grad=True), torch.ones(6, 8, dtype=torch.float64)
    d = (torch.nn.functional.normalize(s, dim=1) - 8**-0.5).norm(dim=1)
    farthest = d.max()
    close(smd_loss(s, t, 0.04), torch.nn.functional.softplus((farthest.detach() - 1e-6) * farthest / 0.04))
    assert torch.autograd.grad(smd_loss(s, t, 0.04), s)[0].isfinite().all()


def test_smd_groups_are_independent_losses():
    torch.manual_seed(0)
    s, t = torch.randn(2, 12, 8, dtype=torch.float64)
    parts = torch.stack([smd_loss(a, b, 0.04) for a, b in zip(s.split(4), t.split(4), strict=True)])
    close(smd_loss(s, t, 0.04, group_size=4), parts.mean())
    assert not torch.allclose(smd_loss(s, t, 0.04), parts.mean())
    with pytest.raises(ValueError, match="group_size 5"):
        smd_loss(s, t, 0.04, group_size=5)


def test_simsiam_loss_and_gradient_are_the_authors():
    g = {k.removeprefix("case0/"): v for k, v in arrays("simsiam").items()}
    p1, p2, z1, z2 = (g[k].clone().requires_grad_() for k in ("p1", "p2", "z1", "z2"))
    loss = 0.5 * negative_cosine(p1, z2) + 0.5 * negative_cosine(p2, z1)
    close(loss, g["loss"])
    close(torch.autograd.grad(loss, p1, retain_graph=True)[0], g["grad_p1"])
    close(torch.autograd.grad(loss, p2, retain_graph=True)[0], g["grad_p2"])
    assert torch.autograd.grad(loss, [z1, z2], allow_unused=True) == (None, None), "z must be behind the stop-gradient"


def test_moco_loss_gradient_and_momentum_are_the_authors():
    g = {k.removeprefix("case0/"): v for k, v in arrays("moco").items()}
    query = g["query_emb"].clone().requires_grad_()
    normalise = torch.nn.functional.normalize  # the record starts from raw embeddings
    loss = info_nce(normalise(query), normalise(g["key_emb"]), g["queue_before"].T, g["temperature"].item())
    close(loss, g["loss"])
    close(torch.autograd.grad(loss, query)[0], g["grad_query_emb"])
    k, q = torch.nn.Module(), torch.nn.Module()
    k.p, q.p = (torch.nn.Parameter(g[name].clone()) for name in ("param_k_before", "param_q"))
    momentum_update(k, q, g["momentum"].item())
    close(k.p.detach(), g["param_k_after"])


def test_disco_losses_and_gradients_are_the_authors():
    g, normalise = {k.removeprefix("case0/"): v for k, v in arrays("disco").items()}, torch.nn.functional.normalize
    t1, t2, k = (normalise(g[f"{name}"]) for name in ("teacher_emb_view1", "teacher_emb_view2", "key_emb_view2"))
    for mode in ("default", "only_mse"):
        views = [g[f"student_emb_view{i}"].clone().requires_grad_() for i in (1, 2)]
        s1, s2 = map(normalise, views)
        parts = [8 * consistency_loss(s1, t1), 8 * consistency_loss(s2, t2)]  # their sum over 8 images
        close(parts[0], g[f"{mode}/mse_q"])
        close(parts[1], g[f"{mode}/mse_qk"])
        if mode == "default":
            parts.append(disco_info_nce(s1, k, g["queue_before"].T, g["temperature"].item()))
            close(parts[2], g["default/ce"])
        close(sum(parts), g[f"{mode}/loss"])
        for i, grad in enumerate(torch.autograd.grad(sum(parts), views), start=1):
            close(grad, g[f"{mode}/grad_student_emb_view{i}"])


@pytest.mark.parametrize("world", [1, 2])
def test_disco_weight_is_the_images_of_one_gpu(world):
    """Their summed consistency after the average of DistributedDataParallel: ours, times one process's images."""
    g, normalise = arrays("disco_ddp"), torch.nn.functional.normalize
    student, key = torch.nn.Linear(12, 6, bias=False).double(), torch.nn.Linear(12, 6, bias=False).double()
    with torch.no_grad():
        student.weight.copy_(g["student_weight"])
        key.weight.copy_(g["key_weight"])
        momentum_update(key, student, g["momentum"].item())
        k = normalise(key(g["x_view2"]))
        t1, t2 = (normalise(g[x] @ g["teacher_weight"].T) for x in ("x_view1", "x_view2"))
    s1, s2 = (normalise(student(g[x])) for x in ("x_view1", "x_view2"))
    contrast = disco_info_nce(s1, k, g["queue_before"].T, g["temperature"].item())
    consistency = (8 // world) * (consistency_loss(s1, t1) + consistency_loss(s2, t2))
    for name, loss in {"ce": contrast, "mse": consistency, "total": contrast + consistency}.items():
        grad = torch.autograd.grad(loss, student.weight, retain_graph=True)[0]
        for rank in range(world):
            close(grad, g[f"world{world}/rank{rank}/{name}/grad_weight"])
            close(k, g[f"world{world}/rank{rank}/queue_after"].T[:8])


@pytest.mark.parametrize("mode", ["rkd", "rkd_use_mse"])
def test_rkd_totals_and_gradients_are_the_authors(mode):
    g, normalise = (
        {k.removeprefix("case0/"): v for k, v in arrays("disco_rkd_total").items()},
        torch.nn.functional.normalize,
    )
    t1, t2, k = (normalise(g[name]) for name in ("teacher_emb_view1", "teacher_emb_view2", "key_emb_view2"))
    views = [g[f"student_emb_view{i}"].clone().requires_grad_() for i in (1, 2)]
    s1, s2 = map(normalise, views)
    parts = {
        "ce": disco_info_nce(s1, k, g["queue_before"].T, g["temperature"].item()),
        "dist": rkd_distance(s1, t1),
        "angle": rkd_angle(s1, t1),
        "mse_q": 8 * consistency_loss(s1, t1),
        "mse_qk": 8 * consistency_loss(s2, t2),
    }
    for name, part in parts.items():
        close(part, g[f"{mode}/{name}"])
    total = sum(part for name, part in parts.items() if mode == "rkd_use_mse" or not name.startswith("mse"))
    close(total, g[f"{mode}/loss"])
    for i, grad in enumerate(torch.autograd.grad(total, views, allow_unused=True), start=1):
        close(torch.zeros_like(s1) if grad is None else grad, g[f"{mode}/grad_student_emb_view{i}"])


RELATIONS = {
    "rkd_distance": rkd_distance,
    "rkd_angle": rkd_angle,
    "hard_dark_rank_a3_b3_p4": hard_dark_rank,
    "hard_dark_rank_a2_b3_p4": lambda s, t: hard_dark_rank(s, t, alpha=2),
}


@pytest.mark.parametrize("name", RELATIONS)
def test_relations_and_gradients_are_the_authors(name):
    g = {k.removeprefix("case0/"): v for k, v in arrays("rkd").items()}
    student = g["student"].clone().requires_grad_()
    loss = RELATIONS[name](student, g["teacher"])
    close(loss, g[f"{name}/loss"])
    close(torch.autograd.grad(loss, student)[0], g[f"{name}/grad_student"])


def test_attention_transfer_and_gradient_are_the_authors():
    g = {k.removeprefix("case0/"): v for k, v in arrays("rkd").items()}
    student = g["student_map"].clone().requires_grad_()
    loss = attention_transfer(student, g["teacher_map"])
    close(loss, g["attention_transfer/loss"])
    close(torch.autograd.grad(loss, student)[0], g["attention_transfer/grad_student"])


@pytest.mark.parametrize("relation", [rkd_distance, rkd_angle, hard_dark_rank])
def test_relations_are_those_inside_groups(relation):
    torch.manual_seed(0)
    s, t = torch.randn(2, 18, 8, dtype=torch.float64)
    parts = torch.stack([relation(a, b) for a, b in zip(s.split(6), t.split(6), strict=True)])
    close(relation(s, t, group_size=6), parts.mean())
    assert not torch.allclose(relation(s, t), parts.mean())
    with pytest.raises(ValueError, match="group_size 5"):
        relation(s, t, group_size=5)


def test_hard_dark_rank_needs_neighbours():
    with pytest.raises(ValueError, match="permutation_length 4: an image has 3 neighbours"):
        hard_dark_rank(torch.randn(4, 8), torch.randn(4, 8))


def test_angles_in_pieces_are_the_same_angles_in_bounded_memory():
    torch.manual_seed(0)
    s, t = torch.randn(64, 16, dtype=torch.float64).requires_grad_(), torch.randn(64, 24, dtype=torch.float64)
    results = []
    for piece in (2**30, 3 * 64 * 64, 1):
        largest = Largest()
        with largest:
            loss = rkd_angle(s, t, 32, piece)
            results.append((loss, torch.autograd.grad(loss, s)[0]))
        assert largest.numel <= max(piece, 2 * 32 * 32)  # no less than one vertex of each group
    for loss, grad in results[1:]:
        close(loss, results[0][0])
        close(grad, results[0][1])
    s, largest = torch.randn(256, 128).requires_grad_(), Largest()
    with largest:
        rkd_angle(s, torch.randn(256, 128)).backward()
    assert 2**21 < largest.numel <= 2**22, "256^3 cosines would be 2^24"


def test_equal_embeddings_get_a_finite_gradient():
    torch.manual_seed(0)
    s = torch.nn.functional.normalize(torch.randn(4, 16), dim=1).repeat_interleave(2, 0).requires_grad_()
    t = torch.nn.functional.normalize(torch.randn(8, 16), dim=1)
    for relation in (rkd_distance, rkd_angle, hard_dark_rank):
        assert torch.autograd.grad(relation(s, t), s)[0].abs().max() < 1e4, relation.__name__


def test_seed_loss_and_gradient_are_the_authors():
    g = {k.removeprefix("case0/"): v for k, v in arrays("seed").items()}
    normalise, checked = torch.nn.functional.normalize, 0
    for key in [k for k in g if k.endswith("/loss")]:
        student, (t_s, t_t) = g["student_emb"].clone().requires_grad_(), map(float, key[5:-5].split("_tempT"))
        loss = seed_loss(normalise(student), normalise(g["teacher_emb"]), g["queue_before"].T, t_s, t_t)
        close(loss, g[key])
        close(torch.autograd.grad(loss, student)[0], g[key.replace("/loss", "/grad_student_emb")])
        checked += 1
    assert checked == 4
    small = {k.removeprefix("case0/"): v for k, v in arrays("seed_small_patch").items()}
    s, t = (normalise(small[f"{name}_small_emb"].flatten(0, 1)) for name in ("student", "teacher"))
    for t_t in (0.0001, 0.01):
        close(seed_loss(s, t, small["small_queue_before"].T, 0.2, t_t), small[f"tempS0.2_tempT{t_t}/loss_small"])


def test_symmetric_seed_is_the_mean_over_both_views(monkeypatch):
    path, recorded = GOLDEN / "steps" / "seed.npz", golden.RecordedBatches.batch

    def losses(*views, **flags) -> list[float]:
        def batch(self, step):
            found = recorded(self, step)
            return dataclasses.replace(found, views=[view(found.views[0]) for view in views])

        monkeypatch.setattr(golden.RecordedBatches, "batch", batch)
        return replay("seed", path, base_lr=0.03, **flags)["loss"]

    plain, mirrored = (lambda x: x), (lambda x: x.flip(-1))
    first, second = losses(plain), losses(mirrored)
    assert first[0] != pytest.approx(second[0], rel=1e-3)
    both = losses(plain, mirrored, symmetric=True)
    assert both[0] == pytest.approx((first[0] + second[0]) / 2, rel=1e-9)
    assert losses(plain, plain, symmetric=True) == pytest.approx(first, rel=1e-9), "steps and queue included"


def test_seed_schedule_is_the_authors():
    lr = arrays("seed_lr_schedule")
    for batch in (64, 256, 2048):
        ours = [warmup_schedule(epoch, 200, 0.03, batch, 5) for epoch in range(200)]
        np.testing.assert_allclose(ours, lr[f"dist_b{batch}_cos"], rtol=1e-9)
    ours = [warmup_schedule(epoch, 200, 0.03, 2048, 5, (120, 160)) for epoch in range(200)]
    np.testing.assert_allclose(ours, lr["dist_b2048_step"], rtol=1e-9)


def test_hide_and_seek_hides_the_authors_pixels():
    g = arrays("hide_and_seek")
    for case in ("case0", "case1"):
        torch.manual_seed(g[f"{case}/seed"].item())
        cells = 224 // g[f"{case}/grid_size"].item()
        u = torch.zeros(1, 257)
        u[0, 1 : 1 + cells**2] = torch.rand(cells**2)
        u[0, 0] = {16: 0.3, 8: 0.6, 4: 0.9}[cells]
        fill = torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)
        x = hide_and_seek(torch.ones(1, 3, 224, 224), u, fill)
        hidden = g[f"{case}/hidden_mask"].bool()
        assert torch.equal(x[0], torch.where(hidden, fill, torch.ones(3, 224, 224))) and hidden.any()
        assert torch.equal(hide_and_seek(x, u * 0, fill), x), "a grid of 0 hides nothing"


@pytest.mark.parametrize("clip", [False, True])
def test_lars_steps_are_the_authors(clip):
    g = arrays("larc")
    cases = sorted({k.split("/")[0] for k in g})
    assert cases
    for case in cases:
        c = {k.removeprefix("case0/"): v for k, v in g.items() if k.startswith(f"{case}/")}
        count = len([k for k in c if k.endswith("_init")])
        params = [c[f"param{i}_init"].clone().requires_grad_() for i in range(count)]
        optimizer = LARS(
            params, c["lr"].item(), trust_coefficient=c["trust_coefficient"].item(), clip=clip, eps=c["eps"].item(),
            momentum=c["momentum"].item(), weight_decay=c["weight_decay"].item(),
        )  # fmt: skip
        for step in range(len(c["grad0"])):
            for i, p in enumerate(params):
                p.grad = c[f"grad{i}"][step].clone()
            optimizer.step()
            for i, p in enumerate(params):
                close(p.detach(), c[f"clip{clip}/param{i}_after"][step])
        assert optimizer.param_groups[0]["weight_decay"] == c["weight_decay"].item(), "put back after the step"


@pytest.mark.parametrize("iterations", [0, 1, 3])
def test_sinkhorn_is_the_authors(iterations):
    g = arrays("swav")
    epsilon = g["case0/sinkhorn/epsilon"].item()
    close(sinkhorn(g["case0/sinkhorn/scores"], epsilon, iterations), g[f"case0/sinkhorn/q_iters{iterations}"])
    single = sinkhorn(g["case0/sinkhorn/scores"].float(), epsilon, iterations)  # what a run uses
    close(single.double(), g[f"case0/sinkhorn/q_iters{iterations}"], 1e-4)


@pytest.mark.parametrize("case", ["noqueue", "queue_empty", "queue_full"])
def test_swav_loss_gradients_and_queue_are_the_authors(case):
    g = {k.removeprefix("case0/"): v for k, v in arrays("swav").items()}
    normalise, raw = torch.nn.functional.normalize, g["raw_embeddings"].clone().requires_grad_()  # crops first
    prototypes = normalise(g["prototypes"], dim=1).requires_grad_()
    close(prototypes.detach(), g[f"{case}/prototypes_normalised"])
    z = normalise(raw, dim=2).transpose(0, 1)
    scores, codes = z @ prototypes.T, []
    for a in (0, 1):
        rows = scores[:, a].detach()
        if case == "queue_full":
            rows = torch.cat([g["queue_full"][a] @ prototypes.detach().T, rows])
        close(rows, g[f"{case}/sinkhorn_in_crop{a}"])
        codes.append(sinkhorn(rows, g["epsilon"].item(), 3)[-len(z) :])
        close(codes[a], g[f"{case}/assign_crop{a}"])
    loss = swapped_prediction_loss(scores, torch.stack(codes, 1), g["temperature"].item())
    close(loss, g[f"{case}/loss"])
    grads = torch.autograd.grad(loss, [raw, prototypes])
    close(grads[0], g[f"{case}/grad_raw_embeddings"])
    close(grads[1], g[f"{case}/grad_prototypes"])
    if case != "noqueue":
        queue = g["queue_full"].clone() if case == "queue_full" else torch.zeros_like(g["queue_full"])
        enqueue(queue, z.detach().transpose(0, 1))
        close(queue, g[f"{case}/queue_after"])


@pytest.mark.parametrize("key, warmup, rates", [("bs4096", 40, (0.3, 4.8, 0.0048)), ("bs256", 0, (0.0, 0.6, 0.0006))])
def test_swav_schedule_is_the_authors(key, warmup, rates):
    ours = [warmup_cosine(step, 80, warmup, *rates) for step in range(80)]  # 20 epochs of 4 steps
    np.testing.assert_allclose(ours, arrays("swav")[f"lr_schedule/{key}_4it_20ep"], rtol=1e-9)


@pytest.mark.parametrize("trainer, with_head", [(swav, False), (swav_disco, True), (swav_disco, False)])
def test_swav_steps_are_what_the_equations_give(trainer, with_head, tmp_path):
    lines, theirs = trajectories(trainer, tmp_path / "run", with_head)
    assert len(theirs) == 9, "no queue, an empty one, a full one; frozen and learning prototypes; warm-up and cosine"
    np.testing.assert_allclose([line["loss"] for line in lines], theirs, rtol=1e-8)
    assert all(line.get("mse_term", 1) > 0.01 for line in lines), "too small to be noticed"
