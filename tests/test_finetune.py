"""Fine-tuning: the loop on a tiny rewritten CNN, folders of pictures, and the command."""

import json
import math
from dataclasses import replace

import pytest
import safetensors.torch
import torch
from PIL import Image
from timm.models.resnet import BasicBlock, ResNet

from bench import finetune
from bench.training.digits_resnet import FINETUNE, WEIGHTS, DigitBatches, load_digits_resnet
from bench.training.imagenet import imagenet_data
from bench.training.loop import Data, accuracy, new_optimizer, train
from bench.training.recipe import Recipe, TrainingError
from rs_compile import GridPrune, OptimizedModel, Schedule, models, optimize

CPU = torch.device("cpu")
SCHEDULE = Schedule(grid={0: GridPrune(2, 2)})
RECIPE = Recipe(epochs=1, cooldown_epochs=1, warmup_epochs=0, batch=4, opt="adamw", lr=0.01, min_lr=1e-3, ema_decay=0.8)
UPDATES = 3  # of an epoch


def tiny(seed=0):
    torch.manual_seed(seed)
    return ResNet(BasicBlock, (1, 1, 1, 1), 3, in_chans=1, stem_type="deep", stem_width=2, channels=(4, 4, 8, 8))


class Noise:
    """New images each epoch, from the global random state, or the same ones."""

    def __init__(self, fixed=False):
        self.fixed = fixed

    def __len__(self):
        return UPDATES

    def __iter__(self):
        generator = torch.Generator().manual_seed(5) if self.fixed else torch.default_generator
        for _ in range(UPDATES):
            images = torch.randn(4, 1, 32, 32, generator=generator)
            yield images, images.flatten(1).mean(1).gt(0).long()


DATA = Data(Noise(), Noise(fixed=True), 3)


def run(model, recipe=RECIPE, data=DATA, **options):
    return train(model, data, recipe, device=CPU, identity={"of": "a test"}, **options)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A run that nothing interrupts: the model, what came of it, its checkpoint, the weights after each update."""
    model, path = tiny(), tmp_path_factory.mktemp("straight") / "line.pt"
    seen = []

    def tick(done, every, text):
        seen.append((done, {key: value.clone() for key, value in model.state_dict().items()}))

    trained = run(optimize(model, SCHEDULE, backend="eager"), checkpoint=path, tick=tick)
    return model, trained, path, dict(seen)


@pytest.mark.slow
def test_resuming_gives_the_numbers_of_an_uninterrupted_run(straight, tmp_path):
    model, trained, path, _ = straight

    def interrupt(done, every, text):
        if done == UPDATES + 1:  # in the second epoch
            raise KeyboardInterrupt

    cut = tmp_path / "cut.pt"
    with pytest.raises(KeyboardInterrupt):
        run(optimize(tiny(), SCHEDULE, backend="eager"), checkpoint=cut, tick=interrupt)
    assert len(torch.load(cut, weights_only=True)["history"]) == 2  # before, and one epoch

    again = tiny(seed=9)  # its weights come from the checkpoint
    resumed = run(optimize(again, SCHEDULE, backend="eager"), checkpoint=cut, resume=cut)

    assert same(again.state_dict(), model.state_dict())
    assert same(resumed.ema.state_dict(), trained.ema.state_dict())
    assert resumed.history == trained.history and resumed.last_accuracy == trained.last_accuracy
    assert same(safetensors.torch.load_file(cut.with_suffix(".safetensors")), trained.ema.state_dict())
    there, here = (torch.load(file, weights_only=True)["optimizer"]["state"] for file in (cut, path))
    assert all(same(there[i], here[i]) for i in here) and there.keys() == here.keys()


def test_a_finished_checkpoint_gives_its_result_at_once(straight):
    _, trained, path, _ = straight
    ticks = []
    done = run(
        optimize(tiny(), SCHEDULE, backend="eager"),
        resume=path,
        tick=lambda done, every, _: ticks.append((done, every)),
    )
    assert ticks == [(2 * UPDATES, 2 * UPDATES)]
    assert done.history == trained.history and done.last_accuracy == trained.last_accuracy


def test_the_average_follows_its_formula_and_differs_from_the_weights(straight):
    model, trained, _, seen = straight
    average = {key: value.double() for key, value in seen[1].items()}  # the first update is taken as it is
    for update in range(2, 2 * UPDATES + 1):
        for key, value in seen[update].items():
            average[key] = value.double() if "num_batches" in key else 0.8 * average[key] + 0.2 * value.double()
    got = trained.ema.state_dict()
    for key, value in average.items():
        torch.testing.assert_close(got[key].double(), value, rtol=1e-5, atol=1e-6)
    assert not torch.equal(got["fc.weight"], model.state_dict()["fc.weight"])


def test_the_average_is_evaluated_in_its_rewritten_form(straight):
    _, trained, _, _ = straight
    assert isinstance(trained.ema, OptimizedModel)
    report = trained.ema.report()
    assert report.stages[0].grid_out == (6, 6) and report.flops < report.flops_dense
    images = next(iter(Noise(fixed=True)))[0]
    plain = tiny()
    plain.load_state_dict(trained.ema.state_dict())
    with torch.no_grad():
        rewritten = optimize(plain.eval(), SCHEDULE, backend="eager")(images)
        assert torch.equal(trained.ema(images), rewritten)
        assert not torch.allclose(plain(images), rewritten)


def test_before_is_the_accuracy_of_the_rewritten_model_untrained(straight):
    _, trained, _, _ = straight
    fast = optimize(tiny().eval(), SCHEDULE, backend="eager")
    right = count = 0
    for images, labels in Noise(fixed=True):
        right += int((fast(images).argmax(1) == labels).sum())
        count += len(labels)
    assert trained.history[0] == {"epoch": 0.0, "accuracy": 100 * right / count}


def test_checkpoints_hold_the_models_own_names(straight):
    _, trained, path, _ = straight
    state = torch.load(path, weights_only=True)
    weights = safetensors.torch.load_file(path.with_suffix(".safetensors"))
    assert list(state["model"]) == list(state["ema"]) == list(tiny().state_dict())
    assert weights.keys() == tiny().state_dict().keys()
    fresh = tiny(seed=3)
    models.load_checkpoint(fresh, path.with_suffix(".safetensors"))
    assert same(fresh.state_dict(), trained.ema.state_dict())
    assert sorted(file.name for file in path.parent.iterdir()) == ["line.pt", "line.safetensors"]


def test_batch_norm_statistics_follow_the_batches():
    model = tiny()
    stem, momentum = model.conv1, model.bn1.momentum
    expected = torch.zeros(4)

    class Watched(Noise):
        def __iter__(self):
            nonlocal expected
            for images, labels in super().__iter__():
                with torch.no_grad():
                    means = _stem_in_training(stem, images).mean((0, 2, 3))
                expected = (1 - momentum) * expected + momentum * means
                yield images, labels

    frozen = replace(RECIPE, lr=0.0, min_lr=0.0, weight_decay=0.0, cooldown_epochs=0)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    run(optimize(model, SCHEDULE, backend="eager"), frozen, Data(Watched(), Noise(fixed=True), 3))
    torch.testing.assert_close(model.bn1.running_mean, expected, rtol=1e-5, atol=1e-6)
    after = model.state_dict()
    for key, value in after.items():
        if key.endswith("num_batches_tracked"):
            assert value == UPDATES
        else:  # at a learning rate of 0 nothing else moves; the norms behind the cut move too
            assert torch.equal(value, before[key]) != ("running_" in key), key


def _stem_in_training(stem, images):
    for layer in stem:
        if isinstance(layer, torch.nn.BatchNorm2d):
            images = torch.nn.functional.batch_norm(images, None, None, layer.weight, layer.bias, True, eps=layer.eps)
        else:
            images = layer(images)
    return images


def test_the_learning_rate_warms_up_falls_as_a_cosine_and_stays_lowest():
    recipe = Recipe(epochs=4, cooldown_epochs=2, warmup_epochs=1, batch=4, lr=0.1, warmup_lr=0.01, min_lr=1e-3)
    optimizer, scheduler = new_optimizer(tiny(), recipe, 5)
    rates = []
    for update in range(6 * 5):
        scheduler.step_update(update)
        rates.append({group["lr"] for group in optimizer.param_groups})
    assert all(len(rate) == 1 for rate in rates)
    rates = [rate.pop() for rate in rates]
    assert rates[:5] == pytest.approx([0.01 + 0.09 * i / 5 for i in range(5)])
    cosine = [1e-3 + 0.0495 * (1 + math.cos(math.pi * i / 20)) for i in range(5, 20)]
    assert rates[5:20] == pytest.approx(cosine)
    assert rates[20:] == [1e-3] * 10


def test_an_epoch_in_the_cool_down_trains_at_the_lowest_rate(straight):
    _, trained, _, seen = straight
    assert trained.history[1]["lr"] > RECIPE.min_lr and trained.history[2]["lr"] == RECIPE.min_lr
    assert not torch.equal(seen[2 * UPDATES]["fc.weight"], seen[UPDATES]["fc.weight"])


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(tmp_path):
    class Broken(Noise):
        epochs = 0

        def __iter__(self):
            self.epochs += 1
            for images, labels in super().__iter__():
                yield images * (math.nan if self.epochs == 2 else 1), labels

    path = tmp_path / "dense.pt"
    with pytest.raises(
        TrainingError, match=r"loss of epoch 2 is nan; lower --lr.*\n.*dense\.pt holds the epoch before"
    ):
        run(tiny(), data=Data(Broken(), Noise(fixed=True), 3), checkpoint=path)
    assert len(torch.load(path, weights_only=True)["history"]) == 2


def test_a_checkpoint_of_another_run_or_model_is_refused(straight, tmp_path):
    _, _, path, _ = straight
    with pytest.raises(TrainingError, match=r"another run \(of: \"a test\" there, \"another model\" here\)"):
        train(tiny(), DATA, RECIPE, device=CPU, identity={"of": "another model"}, resume=path)
    with pytest.raises(TrainingError, match=r"recipe: .* there, .* here.*\n.*the same options as then"):
        run(tiny(), replace(RECIPE, lr=0.5), resume=path)
    with pytest.raises(TrainingError, match="there is no such file"):
        run(tiny(), resume=tmp_path / "none.pt")
    with pytest.raises(TrainingError, match=r"no checkpoint of this command.*--checkpoint"):
        run(tiny(), resume=path.with_suffix(".safetensors"))
    torch.save({"model": {}}, tmp_path / "other.pt")
    with pytest.raises(TrainingError, match="no checkpoint of this command"):
        run(tiny(), resume=tmp_path / "other.pt")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"epochs": 0}, "--epochs is 0; write at least 1"),
        ({"cooldown_epochs": -1}, "--cooldown-epochs is -1"),
        ({"lr": math.nan}, "--lr is nan; write at least 0"),
        ({"ema_decay": 1.0}, "--ema-decay is 1.0; write a number from 0 to below 1"),
        ({"epochs": 5}, "--warmup-epochs 5 leaves nothing of --epochs 5"),
        ({"mixup": 0.1, "batch": 3}, "--batch is 3; mixup and cutmix pair the images"),
    ],
)
def test_recipes_out_of_range(values, words):
    with pytest.raises(TrainingError, match=words):
        Recipe(**values)


def test_the_default_is_the_papers_length():
    assert Recipe().all_epochs == 100 and Recipe().cooldown_epochs == 10


def pictures(folder, classes, each=4):
    for i, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for j in range(each):
            Image.new("RGB", (40, 40), (60 * i, 20 * j, 90)).save(folder / name / f"{j}.png")


@pytest.mark.parametrize(
    ("train_classes", "test_classes", "words"),
    [
        (None, None, "there is no folder"),
        ([], ["a"], "has no folder train"),
        (["a", "b"], [], "has no folder val"),
        (["a", "b"], ["a", "c"], "2 classes have pictures in only one of train and val, first 'b'"),
        (["a", "b"], ["a"], "1 classes have pictures in only one"),
        (["a", "b", "c"], ["a", "b", "c"], "has 3 class folders, the model 2 classes; pass --num-classes 3"),
    ],
)
def test_folders_that_do_not_fit(tmp_path, train_classes, test_classes, words):
    folder = tmp_path / "data"
    for name, classes in (("train", train_classes), ("val", test_classes)):
        pictures(folder / name, classes or [])
    with pytest.raises(TrainingError, match=words):
        imagenet_data(
            folder, models.build("test_resnet", num_classes=2), 2, Recipe(batch=2), img_size=48, workers=0, device=CPU
        )


def test_empty_folders_and_too_few_pictures(tmp_path):
    pictures(tmp_path / "train", ["a", "b"])
    (tmp_path / "val").mkdir()
    model = models.build("test_resnet", num_classes=2)
    with pytest.raises(TrainingError, match=r"there are no pictures in .*val"):
        imagenet_data(tmp_path, model, 2, Recipe(batch=2), img_size=48, workers=0, device=CPU)
    pictures(tmp_path / "val", ["a", "b"])
    with pytest.raises(TrainingError, match="has 8 pictures, fewer than --batch 16"):
        imagenet_data(tmp_path, model, 2, Recipe(batch=16), img_size=48, workers=0, device=CPU)


SHORT = ("--epochs", "1", "--cooldown-epochs", "1", "--warmup-epochs", "0", "--device", "cpu")


@pytest.mark.slow
def test_the_command_on_folders_of_pictures_and_its_resume(tmp_path, capsys, monkeypatch):
    data, out, rows = tmp_path / "data", tmp_path / "out", tmp_path / "rows.json"
    pictures(data / "train", ["a", "b"])
    pictures(data / "val", ["a", "b"], each=3)
    weights = tmp_path / "start.safetensors"
    safetensors.torch.save_file(models.build("test_resnet", num_classes=2).state_dict(), weights)
    options = ["--imagenet", str(data), "--model", "test_resnet", "--num-classes", "2", "--img-size", "64"]
    options += ["--batch", "4", "--mixup", "0.2", "--auto-augment", "rand-m5", "--erase", "0.2", "--workers", "0"]
    options += ["--grid", "0:2x3", "--checkpoint", str(weights), "--output", str(out), "--json", str(rows), *SHORT]

    # interrupted in the second epoch: dense, before, first epoch, then
    calls = []

    def interrupted(model, batches, device, amp=False):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return accuracy(model, batches, device, amp)

    with monkeypatch.context() as patched:
        patched.setattr("bench.finetune.accuracy", interrupted)
        patched.setattr("bench.training.loop.accuracy", interrupted)
        assert finetune.main(options) == 130
    assert f"go on with the same options and --resume {out}/line.pt" in capsys.readouterr().err
    first = safetensors.torch.load_file(out / "line.safetensors")
    assert finetune.main(options) == 2
    assert f"line.pt is there already; go on from it with --resume {out}/line.pt" in capsys.readouterr().err

    assert finetune.main([*options, "--resume", str(out / "line.pt")]) == 0
    assert not same(safetensors.torch.load_file(out / "line.safetensors"), first)
    table = capsys.readouterr().out
    written = json.loads(rows.read_text())
    [row] = written["rows"]
    assert row["model"] == "test_resnet" and row["method"] == "line"
    assert row["gflops"] < row["gflops_dense"]
    dense = models.build("test_resnet", num_classes=2, checkpoint=weights)
    val = imagenet_data(data, dense, 2, Recipe(batch=4), img_size=64, workers=0, device=CPU).test
    right = sum(int((dense(images).argmax(1) == labels).sum()) for images, labels in val)
    assert row["accuracy_dense"] == 100 * right / 6
    assert [round(h["epoch"]) for h in row["history"]] == [0, 1, 2]
    assert row["accuracy_finetuned"] == row["history"][-1]["accuracy"]
    assert written["recipe"]["mixup"] == 0.2
    assert "0: 2x3" in table and f"{row['accuracy_pruned']:.2f}" in table

    # of another method, and of other weights
    assert finetune.main([*options, "--method", "token", "--resume", str(out / "line.pt")]) == 2
    assert "is of method 'line', which is not run; add --method line" in capsys.readouterr().err
    other = {key: value + 1 for key, value in safetensors.torch.load_file(weights).items()}
    safetensors.torch.save_file(other, weights)
    assert finetune.main([*options, "--resume", str(out / "line.pt")]) == 2
    assert "is of another run (start: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--imagenet", "x", "--quick"], "--quick is for the digits"),
        (["--imagenet", "x"], "pass --output DIR"),
        (["--imagenet", "x", "--output", "."], "pass --pretrained, or --checkpoint FILE"),
        (["--num-classes", "3"], "--num-classes is for --imagenet"),
        (["--grid", "0:4"], "'0:4' is not STAGE:ROWSxCOLUMNS"),
        (["--device", "nowhere"], "--device nowhere cannot be used here"),
        (["--json", "no/such/folder.json"], "--json no/such/folder.json: give a file in a directory that exists"),
        (["--epochs", "0"], "--epochs is 0"),
        (["--resume", "none.pt"], "there is no such file"),
    ],
)
def test_options_that_cannot_be_followed(options, words, capsys):
    assert finetune.main(options) == 2
    assert words in capsys.readouterr().err


def test_the_digits_model_that_comes_along():
    assert WEIGHTS.stat().st_size < 1_000_000
    assert accuracy(load_digits_resnet(), DigitBatches("test", 128), CPU) > 99


def test_digit_batches_are_full_shuffled_and_repeat_with_the_seed():
    batches = DigitBatches("train", FINETUNE.batch)

    def labels(seed):
        torch.manual_seed(seed)
        return [label for _, label in batches]

    first = labels(1)
    assert len(first) == len(batches) == 1201 // 32 and {len(part) for part in first} == {32}
    assert torch.equal(torch.cat(first), torch.cat(labels(1)))
    assert not torch.equal(torch.cat(first), torch.cat(labels(2)))
    assert sum(len(part) for _, part in DigitBatches("test", 128)) == 596
