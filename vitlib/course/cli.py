"""The command line, ``python -m vitlib``. Heavy imports wait for the command that needs them.

``pretrain`` and ``finetune`` are also what ``torchrun`` starts. They need only torch, torchvision, tqdm, click and
safetensors, and what these bring along.
"""

import os
import shlex
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import click


class PathOrName(click.Path):
    """A path in which ``~`` is the home folder, also where no shell has written it out."""

    def convert(self, value, parameter, context):
        return super().convert(os.path.expanduser(value), parameter, context)


FILE = PathOrName(path_type=Path)
NAME = PathOrName(path_type=str)  # or a name, such as cifar100-small


class OneLineErrors(click.Group):
    """Errors of input, files or missing packages are one line and exit code 2, and Ctrl-C is exit code 130."""

    def invoke(self, context: click.Context):
        try:
            return super().invoke(context)
        except BrokenPipeError:  # the reader, say head, has seen enough; click ends quietly
            raise
        except (ValueError, OSError, ModuleNotFoundError) as error:
            failure = click.ClickException(str(error))
            failure.exit_code = 2
            raise failure from error
        except KeyboardInterrupt:
            click.echo("Interrupted.", err=True)
            context.exit(130)


@click.group(cls=OneLineErrors, context_settings={"help_option_names": ["-h", "--help"]})
@click.pass_context
def main(context: click.Context) -> None:
    """The Vision Transformer course: run its notebooks, fetch its images, train models."""
    from vitlib.course.doctor import granted_cores, usable_cores

    # torch counts the cores of the machine; where a container grants fewer, its threads would wait for each other
    if context.invoked_subcommand != "doctor" and granted_cores() < usable_cores():  # the doctor says what others meet
        os.environ.setdefault("OMP_NUM_THREADS", str(granted_cores()))


@main.command()
@click.option("--only", metavar="03,04", help="Numbers or names of the notebooks to run; all without it.")
@click.option("--parameters", metavar="FILE", type=FILE, help="YAML file of parameters.")
@click.option("-p", "given", metavar="NAME VALUE", nargs=2, multiple=True, help="One parameter; wins over FILE.")
@click.option("--out", metavar="DIR", type=FILE, help="Folder of the run (see above).")
@click.option(
    "--timeout", metavar="SECONDS", type=click.FloatRange(min=0), default=3600, show_default=True,
    help="Longest time for one cell; 0 for no limit.",
)  # fmt: skip
@click.option(
    "--notebooks", metavar="DIR", type=FILE,
    help="Folder of the notebooks; the course's own without it.",
)  # fmt: skip
def run(only, parameters, given, out, timeout, notebooks) -> None:
    """Run notebooks in order through papermill, and print a table of what came out.

    Without --out the run goes to runs/class, to runs/<FILE's name> with --parameters, and to runs/custom with -p.
    The exit code is 0 when every notebook ran through, 1 when one failed, 2 for a wrong command, 130 after Ctrl-C.
    """
    from vitlib.course import runner

    if out is None:
        out = Path("runs") / ("custom" if given else parameters.stem if parameters else "class")
    outcomes = runner.run_course(
        out,
        notebooks=notebooks or runner.COURSE_FOLDER,
        only=[word.strip() for word in only.split(",") if word.strip()] if only else (),
        shared=runner.parameters_from_file(parameters) if parameters else {},
        given=dict(given),
        timeout=timeout or None,
    )
    click.echo(f"\n{runner.summary(outcomes)}\n\nNotebooks and metrics.json are in {out}.")
    statuses = {outcome.status for outcome in outcomes.values()}
    sys.exit(130 if "interrupted" in statuses else 0 if statuses == {"ok"} else 1)


class WordsAfterOption(click.Command):
    """Let ``--grid`` and ``--zip`` take several words: click gets the lines of one text."""

    def parse_args(self, context: click.Context, args: list[str]) -> list[str]:
        joined = []
        for word in args:
            if "=" in word and not word.startswith("-") and len(joined) > 1 and joined[-2] in ("--grid", "--zip"):
                joined[-1] += f"\n{word}"
            else:
                joined.append(word)
        return super().parse_args(context, joined)


@main.command(cls=WordsAfterOption)
@click.argument("notebook", metavar="NOTEBOOK|FILE.yaml", type=FILE)
@click.option("--grid", metavar="NAME=A,B ...", multiple=True, help="Values of parameters; each is crossed with all.")
@click.option("--zip", "zips", metavar="NAME=A,B ...", multiple=True, help="Values that go together, first with first.")
@click.option("--parameters", metavar="FILE", type=FILE, help="YAML file of common parameters.")
@click.option("-p", "given", metavar="NAME VALUE", nargs=2, multiple=True, help="A common parameter; wins over FILE.")
@click.option("--out", metavar="DIR", type=FILE, help="Folder of the sweep (see above).")
@click.option("--dry-run", is_flag=True, help="Print the runs and stop.")
@click.option("--scheduler", metavar="tcp://HOST:PORT", help="Dask scheduler; this machine's cores without it.")
@click.option("--workers", metavar="N", type=click.IntRange(1), help="Runs at a time; by cores and memory without it.")
@click.option("--threads-per-run", "threads", metavar="N", type=click.IntRange(1), help="Without it, cores / workers.")
@click.option(
    "--retries", metavar="N", type=click.IntRange(0, 100), default=0, show_default=True, help="Per failed run."
)
@click.option(
    "--timeout", metavar="SECONDS", type=click.FloatRange(min=0), default=3600, show_default=True,
    help="Longest time for one run; 0 for no limit.",
)  # fmt: skip
def sweep(notebook, grid, zips, parameters, given, out, dry_run, scheduler, workers, threads, retries, timeout) -> None:
    """Run NOTEBOOK with every combination of parameters, several at a time, and gather the results.

    FILE.yaml holds the same as the options: notebook, grid, zip and parameters; options win. Without --out the sweep
    goes to runs/sweep-<name of NOTEBOOK or FILE>. There results.csv, results.json and report.html grow beside the
    executed notebooks. The same command again runs what is missing or failed. The exit code is 0 when every run is
    finished, 1 when one failed, 2 for a wrong command, 130 after Ctrl-C.
    """
    from vitlib.course import sweep as sweeps
    from vitlib.course.runner import parameters_from_file

    if scheduler and workers:
        raise click.UsageError("--workers is about this machine; the scheduler of --scheduler has workers of its own.")
    plan = sweeps.make_plan(
        notebook,
        sweeps.parse_axes("\n".join(grid).split("\n") if grid else ()),
        [sweeps.parse_axes(words.split("\n")) for words in zips],
        parameters_from_file(parameters) if parameters else {},
        dict(given),
    )
    out = out or Path("runs") / f"sweep-{notebook.stem}"
    if dry_run:
        click.echo(sweeps.preview(plan, out))
        return
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what ends a batch job is as gentle as Ctrl-C
    results = sweeps.run_sweep(
        plan, out, scheduler=scheduler, workers=workers, threads=threads, retries=retries, timeout=timeout or None,
        command=shlex.join(["python", "-m", "vitlib", *sys.argv[1:]]), say=click.echo,
    )  # fmt: skip
    click.echo(f"\n{sweeps.summary(results)}\n\nresults.csv, results.json and report.html are in {out}.")
    statuses = {run["status"] for run in results["runs"]}
    sys.exit(130 if "not run" in statuses else 0 if statuses <= {"ok"} else 1)


@main.command()
@click.argument("name")
@click.option(
    "--data-dir", metavar="DIR", type=NAME, help="Where to keep it; VITLIB_DATA or the usual cache without it."
)
def download(name, data_dir) -> None:
    """Fetch the images NAME (for instance cifair100), so that notebooks find them without a network."""
    from vitlib.data.images import download as fetch

    fetch(name, data_dir)
    click.echo(f"{name} is ready.")


class TrainingCommand(click.Command):
    """A command whose options are parameters of the course, checked as the notebooks check them.

    Args:
        defaults: by the name of the parameter; None for a value that the command finds itself, if it is not optional.
    """

    def __init__(self, *args, defaults: dict[str, object], **kwargs):
        super().__init__(*args, **kwargs)
        self.defaults = defaults

    def get_params(self, context: click.Context) -> list[click.Parameter]:
        return [*self.course_options, *super().get_params(context)]

    @cached_property
    def course_options(self) -> list[click.Option]:
        from vitlib.course.parameters import PARAMETERS  # loads torch

        def option(name: str, default: object) -> click.Option:
            parameter = PARAMETERS[name]
            is_found = default is None and not parameter.optional
            words = f"{'|'.join(parameter.choices) or parameter.type.__name__}, default "
            words += "by the number of images" if is_found else str(default)

            def check(context, option, value):
                if value is None:
                    return None
                return parameter.check(parameter.parse(value) if isinstance(value, str) else value)

            flag = f"--{name.replace('_', '-')}"
            return click.Option(
                [flag, name], metavar="", type=str, default=default, callback=check, help=f"{parameter.help} [{words}]"
            )

        return [option(name, default) for name, default in self.defaults.items()]


TRAINING = {
    "train_steps_per_epoch": None, "eval_steps_per_epoch": None, "validation_fraction": 0.1, "seed": 0,
    "device": "auto", "precision": "auto", "compile": False, "data_dir": None, "image_size": None,
}  # fmt: skip


@main.command(cls=TrainingCommand, defaults={
    "upstream": "cifair100", "preset": "small", "recipe": "modern", "norm_first": True, "pooling": "cls",
    "pretrain_epochs": 100, "batch_size": 128, **TRAINING, "run_dir": "runs/pretrain",
})  # fmt: skip
def pretrain(upstream, preset, run_dir, data_dir, image_size, **options) -> None:
    """Train a new model and score its last weights on the test split, once.

    RUN_DIR gets pretrained.safetensors with the record of the run, pretrained-history.json, and the file from which
    the same command, called again, resumes an interrupted training.
    """
    from vitlib import training
    from vitlib.model import PRESETS
    from vitlib.training.distributed import init_distributed

    options["device"] = init_distributed(options["device"])
    train, test = _splits(upstream, data_dir, image_size or PRESETS[preset]["image_size"])
    with _compiling(options["compile"]):
        trained = training.pretrain(train, preset, run_dir=run_dir, resume=True, source=upstream, **options)
    _score(trained, test, upstream, Path(run_dir) / "pretrained.safetensors")


@main.command(cls=TrainingCommand, defaults={
    "downstream": "cifair10", "weights": "cifar100-small", "recipe": "modern", "freeze_encoder": False,
    "finetune_epochs": None, "batch_size": None, **TRAINING, "run_dir": "runs/finetune",
})  # fmt: skip
def finetune(
    downstream, weights, run_dir, data_dir, image_size, recipe, batch_size, finetune_epochs, **options
) -> None:
    """Move the encoder of WEIGHTS to other images, train it there and score it on their test split, once.

    With --weights random a new encoder of the small preset takes its place, trained from scratch as in pretraining:
    the control. RUN_DIR gets finetuned.safetensors and what belongs to it, predictions.csv with every test image, and,
    where matplotlib is installed, confusion.png and mistakes.png, the images that the model is most sure of and wrong
    about. An earlier training with other settings moves to a folder of its own there.
    """
    from vitlib import training
    from vitlib.course import own_images
    from vitlib.model import PRESETS
    from vitlib.training.distributed import current_context, init_distributed
    from vitlib.training.resume import OtherTraining

    if weights is None:
        raise ValueError("weights=None names no encoder; give a shipped name, a checkpoint file, or random.")
    options["device"] = init_distributed(options["device"])
    if weights == "random":
        train, test = _splits(downstream, data_dir, image_size or PRESETS["small"]["image_size"])
        model, card = _new_encoder(train, options["seed"])
        recipe = (training.FINETUNING if options["freeze_encoder"] else training.RECIPES)[recipe]
    else:
        model, card = _encoder(weights, image_size)
        train, test = _splits(downstream, data_dir, model.config["image_size"], model.config["num_channels"])
    batch_size = batch_size or own_images.batch_size_for(len(train))
    if finetune_epochs is None:
        finetune_epochs = 1 if options["train_steps_per_epoch"] else own_images.epochs_for(len(train), batch_size)
    _say(f"{len(train):,} training images: batch_size={batch_size}, finetune_epochs={finetune_epochs}.")

    def train_once():
        with _compiling(options["compile"]):
            return training.finetune(
                model, card, train, recipe=recipe, batch_size=batch_size, finetune_epochs=finetune_epochs,
                run_dir=run_dir, resume=True, source=downstream, **options,
            )  # fmt: skip

    try:
        trained = train_once()
    except OtherTraining as error:
        if current_context().is_first:
            _say(f"{error.difference}: that training is now in {_set_aside(Path(run_dir))}, and a new one begins.")
        trained = train_once()
    checkpoint = Path(run_dir) / "finetuned.safetensors"
    is_first = current_context().is_first
    trained = _score(trained, test, downstream, checkpoint)
    if is_first:
        click.echo(_look_at_errors(trained, test, checkpoint.parent))
        click.echo(f"Use it: {shlex.join(['python', '-m', 'vitlib', 'predict', str(checkpoint)])} image.jpg")


def _say(sentence: str) -> None:
    """Print a sentence, of several processes only in the first."""
    from vitlib.training.distributed import current_context

    if current_context().is_first:
        click.echo(sentence)


def _splits(source: str, data_dir: str | None, image_size: int, num_channels: int = 3):
    """Load training and test images; only the first process shows progress."""
    from vitlib.data import load_images
    from vitlib.training.distributed import current_context

    options = {"data_dir": data_dir, "image_size": image_size, "num_channels": num_channels}
    options["progress"] = current_context().is_first
    return load_images(source, "train", **options), load_images(source, "test", **options)


def _new_encoder(train, seed: int):
    import torch

    from vitlib.data import channel_statistics
    from vitlib.model import create_model
    from vitlib.weights import ModelCard

    torch.manual_seed(seed)
    model = create_model("small", 1, image_size=train.images.shape[-1], num_channels=train.images.shape[1])
    return model, ModelCard(("none",), *channel_statistics(train.images), "small", {"stage": "random"})


def _encoder(weights: str, image_size: int | None):
    """Load weights for images of ``image_size``; where the model's own is another, a line says what that means."""
    from vitlib.costs import costs
    from vitlib.weights import load_weights, with_image_size

    model, card = load_weights(weights)
    if image_size is None or image_size == model.config["image_size"]:
        return model, card
    other = with_image_size(model, image_size)
    before, after = costs(model.config), costs(other.config)
    _say(
        f"The encoder knows images of {model.config['image_size']} pixels a side ({before.patches} patches) and gets "
        f"{image_size} ({after.patches} patches): its positions are interpolated, and a step takes "
        f"{after.training_flops.total / before.training_flops.total:.2g} times the FLOPs."
    )
    return other, card


@contextmanager
def _compiling(compile: bool) -> Iterator[None]:
    """Turn the errors of torch.compile, which are pages long, into a sentence."""
    try:
        yield
    except Exception as error:
        if not (compile and type(error).__module__.startswith(("torch._inductor", "torch._dynamo"))):
            raise
        reason = next(line for line in [*str(error).splitlines(), type(error).__name__] if line.strip())
        raise ValueError(
            f"compile=True does not work here ({reason:.100}); install a C++ compiler such as g++, or leave it out."
        ) from error


def _set_aside(run_dir: Path) -> Path:
    """Move the files of an earlier fine-tuning into a new folder below ``run_dir``, and return it."""
    folder = next(folder for number in range(1, 10**6) if not (folder := run_dir / f"earlier-{number}").exists())
    folder.mkdir()
    for path in [*run_dir.glob("finetuned*"), *run_dir.glob("*.png"), *run_dir.glob("predictions.csv")]:
        path.rename(folder / path.name)
    return folder


def _score(trained, test, source: str, checkpoint: Path):
    """Score the last weights, write the result into their file, print it, and leave other processes.

    Returns:
        the weights with the score in their card.
    """
    from vitlib.course.own_images import chance, wilson_interval
    from vitlib.training import record_test
    from vitlib.training.distributed import end_distributed

    if trained.history.interrupted:
        end_distributed()
        sys.exit(130)
    trained.card.record["command"] = shlex.join(["python", "-m", "vitlib", *sys.argv[1:]])
    trained = record_test(trained, test, source, checkpoint)
    score, epochs = trained.card.record["test"], trained.history.epochs
    low, high = wilson_interval(score["accuracy"], score["images"])
    _say(
        f"{score['accuracy']:.2%} top-1 (95 % interval {low:.1%} to {high:.1%}, chance {chance(test.labels):.1%}, loss "
        f"{score['loss']:.3f}) on the {score['images']} test images of {source}, after {len(trained.history.steps)} "
        f"steps in {len(epochs)} epochs and {sum(epoch['seconds'] for epoch in epochs):.0f} s of training; the weights "
        f"are in {checkpoint}."
    )
    end_distributed()
    return trained


def _look_at_errors(trained, test, folder: Path) -> str:
    """Write predictions.csv and draw the figures of errors. Return a sentence about them.

    The training is over and stored by now, so an error here costs no more than the sentence.
    """
    from vitlib.course import own_images
    from vitlib.training import predict

    logits = predict(trained.model, test.images, trained.card)
    table = folder / "predictions.csv"
    own_images.write_predictions(table, test, logits)
    try:
        said = own_images.draw_errors(folder, test, logits)
    except ModuleNotFoundError as error:
        said = f"Figures of the errors need {error.name}; install it with `pip install {error.name}`."
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0]
        said = f"The figures of the errors could not be drawn ({type(error).__name__}: {reason:.200})."
    return f"{said} All predictions: {table}."


@main.command()
@click.argument("model", type=NAME)
@click.argument("images", metavar="IMAGE...", type=NAME, nargs=-1, required=True)
@click.option(
    "--top", metavar="N", type=click.IntRange(1), default=5, show_default=True, help="Classes for each image."
)
@click.option(
    "--batch-size", metavar="N", type=click.IntRange(1), default=32, show_default=True, help="Images at once."
)
@click.option(
    "--csv", "table", metavar="FILE", type=FILE, help="Write a line for each image and class to this file, too."
)
def predict(model, images, top, batch_size, table) -> None:
    """Print the classes that MODEL finds most probable for each IMAGE.

    MODEL is a checkpoint, such as finetune's runs/finetune/finetuned.safetensors, or a shipped name such as
    cifar100-small. An image that cannot be read gets one line on stderr, and the others are still predicted. The exit
    code is 0 when every image was predicted, 1 when one was not, 2 for a wrong command or MODEL.
    """
    from vitlib.course.own_images import write_csv
    from vitlib.predict import predict_files
    from vitlib.training import resolve_device
    from vitlib.utils import printable
    from vitlib.weights import load_weights

    network, card = load_weights(model)
    rows, complete = [], True
    for prediction in predict_files(network.to(resolve_device()), card, images, top=top, batch_size=batch_size):
        if prediction.error is not None:
            complete = False
            click.echo(prediction.error, err=True)
            rows.append((prediction.path, "", "", "", prediction.error))
            continue
        click.echo(printable(prediction.path))
        for rank, (name, probability) in enumerate(prediction.classes, start=1):
            click.echo(f"  {probability:6.1%}  {name}")
            rows.append((prediction.path, rank, name, f"{probability:.4f}", ""))
    if table:
        write_csv(table, ("file", "rank", "class", "probability", "error"), rows)
    sys.exit(0 if complete else 1)


@main.command()
@click.argument("model", type=NAME)
@click.argument("out", type=FILE)
def export(model, out) -> None:
    """Write MODEL to OUT for programs without vitlib: as ONNX (.onnx) or as a PyTorch program (.pt2).

    MODEL is a checkpoint or a shipped name. OUT takes images as they are decoded, uint8 [batch, channels, height,
    width] in batches of any size, normalises them itself and gives logits [batch, classes]. It is compared with MODEL
    before it is kept. ONNX needs `pip install "vitlib[export]"`.
    """
    from vitlib.export import TOLERANCE, export_model
    from vitlib.weights import load_weights

    network, card = load_weights(model)
    difference = export_model(network, card, out)
    shape = ", ".join(str(network.config[name]) for name in ("num_channels", "image_size", "image_size"))
    click.echo(
        f"{out} ({out.stat().st_size / 1e6:.1f} MB) takes uint8 images [batch, {shape}] and gives logits [batch, "
        f"{network.config['num_classes']}]; on random images they differ from the model's by at most {difference:.1e} "
        f"(allowed: {TOLERANCE:g})."
    )


@main.command()
@click.argument("folder", metavar="DIR", type=FILE)
@click.option(
    "--parameters", metavar="FILE", type=FILE,
    help="YAML file of parameters; the course's smoke.yaml without it.",
)  # fmt: skip
@click.option("-p", "given", metavar="NAME VALUE", nargs=2, multiple=True, help="One parameter; wins over FILE.")
@click.option(
    "--out", metavar="DIR", type=FILE, default=Path("runs/grades"), show_default=True,
    help="Folder for grades.csv and the executed copies.",
)  # fmt: skip
@click.option(
    "--timeout", metavar="SECONDS", type=click.FloatRange(min=0, min_open=True), default=600, show_default=True,
    help="Longest time for one notebook.",
)  # fmt: skip
@click.option(
    "--memory", metavar="GIB", type=click.FloatRange(min=0, min_open=True), default=4, show_default=True,
    help="Most memory for one notebook.",
)  # fmt: skip
@click.option("--jobs", metavar="N", type=click.IntRange(min=1), default=1, show_default=True, help="How many at once.")
@click.option(
    "--notebooks", metavar="DIR", type=FILE,
    help="Folder of the course's notebooks; the course's own without it.",
)  # fmt: skip
def grade(folder, parameters, given, out, timeout, memory, jobs, notebooks) -> None:
    """Run the students' notebooks in DIR with strict checks, and print a table of who passed what.

    DIR holds ada/01_patching.ipynb, 01_patching_ada.ipynb or the like. The first lines say what students' code is kept
    from on this machine, and what not; use a container for people you do not know. The exit code is 0 when every
    notebook ran to its end, whatever the marks, 1 when one did not, 2 for a wrong command, 130 after Ctrl-C (grades.csv
    keeps what was done).
    """
    from vitlib.course import grade as grading

    found = grading.grade_folder(
        folder, out, notebooks=notebooks or grading.COURSE_FOLDER, parameters=parameters, given=dict(given),
        timeout=timeout, memory=memory, jobs=jobs, say=click.echo,
    )  # fmt: skip
    click.echo(f"\n{grading.tables(found, folder)}\ngrades.csv and the executed copies are in {out}.")
    sys.exit(1 if any(one.note for one in found) else 0)


@main.command()
def doctor() -> None:
    """Print what this machine can do and what is missing."""
    from vitlib.course import doctor

    facts = doctor.gather()
    click.echo(doctor.report(facts))
    sys.exit(0 if doctor.can_run(facts) else 1)
