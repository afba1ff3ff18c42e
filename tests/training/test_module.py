"""RegistrationModule under a real Lightning Trainer."""

import pytest
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader

from monai_lm import RegistrationInferer
from monai_lm.convert import from_lapirn
from monai_lm.fields import fold_count, gaussian_smooth, warp
from monai_lm.similarity import LNCC
from monai_lm.training import RegistrationModule


def _pairs(count, labels=False):
    """2D images and their copies shifted by two voxels."""
    generator = torch.Generator().manual_seed(0)
    moving = gaussian_smooth(torch.randn(count, 1, 24, 24, generator=generator), 2.0)
    shift = torch.zeros(count, 2, 24, 24)
    shift[:, 0] = 2.0
    fixed = warp(moving, shift)
    rows = {"fixed": fixed, "moving": moving}
    if labels:
        rows |= {"fixed_label": (fixed > 0).float(), "moving_label": (moving > 0).float()}
    return [{k: v[i] for k, v in rows.items()} for i in range(count)]


def _network():
    torch.manual_seed(0)
    last = torch.nn.Conv2d(8, 2, 3, padding=1)
    torch.nn.init.normal_(last.weight, std=1e-3)
    return torch.nn.Sequential(torch.nn.Conv2d(2, 8, 5, padding=2), torch.nn.ReLU(), last)


def _trainer(tmp_path, **kwargs):
    return pl.Trainer(
        default_root_dir=tmp_path, accelerator="cpu", logger=False, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False, **kwargs,
    )  # fmt: skip


@pytest.mark.parametrize("labels", [0, 2])
def test_training_improves_the_validation_similarity(tmp_path, labels):
    module = RegistrationModule(_network(), labels=labels, learning_rate=1e-2)
    loader = DataLoader(_pairs(8, labels > 0), batch_size=4)
    trainer = _trainer(tmp_path, max_epochs=15)
    before = trainer.validate(module, loader, verbose=False)[0]
    trainer.fit(module, loader)
    after = trainer.validate(module, loader, verbose=False)[0]
    assert after["val_similarity_before"] < 0.8 * before["val_similarity_before"]
    if labels:
        assert after["val_dice_before"] > before["val_dice_before"]


def test_predict_refines_in_inference_mode(tmp_path):
    pairs = _pairs(2)
    loader = DataLoader(pairs, batch_size=2)
    out = _trainer(tmp_path).predict(RegistrationModule(_network(), refine={"scales": (2, 1)}), loader)[0]
    alone = _trainer(tmp_path).predict(RegistrationModule(_network()), loader)[0]["ddf"]
    refined = out["ddf"]
    torch.testing.assert_close(out["predicted"], alone)
    assert [h[-1].loss for h in out["history"]] == pytest.approx(out["final_loss"].tolist(), rel=0.05)
    fixed, moving = (torch.stack([p[k] for p in pairs]) for k in ("fixed", "moving"))
    error = (warp(moving, refined) - fixed).square().mean()
    assert error < 0.1 * (warp(moving, alone) - fixed).square().mean()
    assert fold_count(refined).tolist() == [0, 0]


def test_settings_are_saved():
    module = RegistrationModule(_network(), labels=2, smoothness=0.7)
    assert module.hparams["smoothness"] == 0.7
    assert "network" not in module.hparams


def test_validation_logs_the_gain_of_refinement(tmp_path):
    pairs = _pairs(3, labels=True)
    module = RegistrationModule(_network(), labels=2, refine={"scales": (2, 1)})
    logged = _trainer(tmp_path).validate(module, DataLoader(pairs, batch_size=2), verbose=False)[0]
    assert logged["val_similarity_after"] < 0.2 * logged["val_similarity_before"]
    assert logged["val_dice_after"] > max(0.95, logged["val_dice_before"])
    assert logged["val_folds_after"] == 0
    fields = _trainer(tmp_path).predict(module, DataLoader(pairs, batch_size=1))
    losses = [
        float(LNCC()(warp(pair["moving"][None], out["ddf"]), pair["fixed"][None])) / pair["fixed"].numel()
        for pair, out in zip(pairs, fields, strict=True)
    ]
    assert logged["val_similarity_after"] == pytest.approx(sum(losses) / 3, rel=1e-3)


def test_test_measures_surfaces_and_landmarks(tmp_path):
    points = torch.tensor([[10.0, 10.0], [14.5, 9.0], [float("nan"), 0.0]])
    shift = torch.tensor([2.0, 0.0])
    pairs = [{**p, "fixed_points": points, "moving_points": points + shift} for p in _pairs(2, labels=True)]
    module = RegistrationModule(_Still(), refine={"scales": (2, 1)})
    logged = _trainer(tmp_path).test(module, DataLoader(pairs), verbose=False)[0]
    assert logged["test_tre_mm_before"] == pytest.approx(2.0)
    assert logged["test_tre_mm_after"] < 0.2
    assert logged["test_hd95_mm_after"] < logged["test_hd95_mm_before"]
    assert (logged["test_sdlogj_before"], logged["test_folds_before"]) == (0, 0)


class _Still(torch.nn.Module):
    """Predicts no motion, with a parameter that does nothing."""

    def __init__(self):
        super().__init__()
        self.shift = torch.nn.Parameter(torch.zeros(2))

    def forward(self, images):
        return self.shift.view(1, 2, 1, 1).expand(len(images), 2, *images.shape[2:])


@pytest.mark.parametrize("term", ["keypoints", "coarse labels", "known", "distill"])
def test_every_term_moves_a_shift_to_where_it_should_be(tmp_path, term):
    pairs = _pairs(4)
    extra = {"similarity": None, "smoothness": 0.0, "prediction": "displacement"}
    if term == "keypoints":
        points = torch.rand(5, 2, generator=torch.Generator().manual_seed(0)) * 20
        pairs = [{**p, "fixed_points": points, "moving_points": points + torch.tensor([2.0, 0.0])} for p in pairs]
        extra["keypoints"] = 1.0
    elif term == "coarse labels":
        shares = {k: torch.stack([p[k] for p in pairs]) for k in ("fixed", "moving")}
        shares = {k: torch.cat([(v > 0).float(), (v < 0).float()], 1) for k, v in shares.items()}
        pool = torch.nn.functional.avg_pool2d
        pairs = [
            {**p, "fixed_label": pool(shares["fixed"], 2)[i], "moving_label": pool(shares["moving"], 2)[i]}
            for i, p in enumerate(pairs)
        ]
        extra["labels"] = 3
    elif term == "known":
        half = torch.zeros(2, 12, 12)
        half[0] = 2.0 * 11 / 23  # on a grid of half as many voxels
        pairs = [{**p, "ddf": half} for p in pairs]
        extra["known"] = 1.0
    else:
        extra |= {"supervision": "distill", "refine": {"scales": (2, 1)}, "distillation": {"weight": 1.0, "every": 3}}
    module = RegistrationModule(_Still(), learning_rate=0.2, **extra)
    _trainer(tmp_path, max_epochs=20).fit(module, DataLoader(pairs, batch_size=2))
    torch.testing.assert_close(module.network.shift.detach(), torch.tensor([2.0, 0.0]), atol=0.35, rtol=0)


def test_a_fit_that_was_stopped_goes_on_where_it_was(tmp_path):
    def fit(epochs, path=None, folder="a"):
        torch.manual_seed(1)
        module = RegistrationModule(_network(), optimizer=lambda p: torch.optim.Adam(p, 1e-2))
        trainer = _trainer(tmp_path / folder, max_epochs=epochs)
        trainer.fit(module, DataLoader(_pairs(4), batch_size=2), ckpt_path=path)
        trainer.save_checkpoint(tmp_path / folder / "last.ckpt")
        return module

    whole = fit(4)
    fit(2, folder="b")
    resumed = fit(4, tmp_path / "b" / "last.ckpt", folder="c")
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("precision", ["bf16-mixed", "32-true"])
def test_precision_and_accumulation_train_and_refine(tmp_path, precision):
    module = RegistrationModule(_network(), learning_rate=1e-2, refine={"scales": (1,), "iterations": 5})
    loader = DataLoader(_pairs(4), batch_size=1)
    trainer = _trainer(tmp_path, max_epochs=6, precision=precision, accumulate_grad_batches=2)
    before = trainer.validate(module, loader, verbose=False)[0]
    trainer.fit(module, loader)
    after = trainer.validate(module, loader, verbose=False)[0]
    assert after["val_similarity_before"] < before["val_similarity_before"]
    assert after["val_similarity_after"] < after["val_similarity_before"]


def test_optimizer_and_scheduler_are_those_given(tmp_path):
    module = RegistrationModule(
        _network(),
        optimizer=lambda p: torch.optim.SGD(p, 0.5),
        scheduler=lambda o: torch.optim.lr_scheduler.StepLR(o, 1),
    )
    trainer = _trainer(tmp_path, max_steps=3)
    trainer.fit(module, DataLoader(_pairs(3)))
    assert isinstance(trainer.optimizers[0], torch.optim.SGD)
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.5 * 0.1**3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"supervision": "other"}, "supervision must be one of"),
        ({"supervision": "distill"}, "refine must be keyword arguments"),
        ({"supervision": "implicit", "refine": {}}, "needs labels or keypoints"),
    ],
)
def test_arguments_that_do_not_go_together_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        RegistrationModule(_network(), **arguments)


@pytest.mark.parametrize(
    ("batch", "error", "message"),
    [
        ({"fixed": torch.zeros(1, 1, 8, 8)}, KeyError, "a batch must have 'moving'"),
        ({"fixed": torch.zeros(1, 1, 8, 8), "moving": torch.zeros(1, 1, 8, 9)}, ValueError, "on one grid"),
    ],
)
def test_batches_that_lack_something_are_refused(batch, error, message):
    with pytest.raises(error, match=message):
        RegistrationModule(_network()).predict_step(batch, 0)


def test_a_fit_goes_on_from_a_checkpoint_for_longer(tmp_path):
    """The one-cycle schedule then spans the longer fit: from where it was, down to its end."""
    loader = DataLoader(_pairs(4), batch_size=2)
    first = _trainer(tmp_path, max_epochs=2)
    first.fit(RegistrationModule(_network()), loader)
    first.save_checkpoint(tmp_path / "a.ckpt")
    longer = _trainer(tmp_path, max_epochs=10)
    longer.fit(RegistrationModule(_network()), loader, ckpt_path=tmp_path / "a.ckpt")
    assert longer.global_step == 20
    whole = _trainer(tmp_path, max_epochs=10)
    whole.fit(RegistrationModule(_network()), loader)
    last = [trainer.optimizers[0].param_groups[0]["lr"] for trainer in (longer, whole)]
    assert last[0] == pytest.approx(last[1])


def test_a_network_with_a_convention_and_a_grid_of_its_own_is_asked_as_the_inferer_asks_it(tmp_path):
    """And trains: from nothing, the shift of two voxels is learned through the conversion."""
    size, network = (16, 32), _network()
    how = {"convert": from_lapirn, "network_size": size}
    module = RegistrationModule(network, "displacement", learning_rate=3e-2, similarity="mse", **how)
    images = torch.cat([torch.stack([row[key] for row in _pairs(2)]) for key in ("moving", "fixed")], 1)
    assert torch.equal(module(images), RegistrationInferer("displacement", **how)(images, network))
    loader = DataLoader(_pairs(2), batch_size=2)
    trainer = _trainer(tmp_path, max_epochs=25)
    before = trainer.validate(module, loader, verbose=False)[0]["val_similarity_before"]
    trainer.fit(module, loader)
    assert trainer.validate(module, loader, verbose=False)[0]["val_similarity_before"] < 0.7 * before
