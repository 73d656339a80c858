"""The command line, ``python -m vitlib``. Heavy imports wait for the command that needs them.

``torchrun`` starts ``pretrain`` and ``finetune``, too.
"""

import errno
import os
import shlex
import signal
import sys
from pathlib import Path

import click

FILE = click.Path(path_type=Path)  # vitlib writes ~ out as the home folder where it opens a path
COUNT = click.IntRange(min=1)
LIMIT = click.FloatRange(min=0)  # 0 is no limit
POSITIVE = click.FloatRange(min=0, min_open=True)
WAYS_OUT = {  # of errors of the system, by their numbers
    errno.ENOSPC: "; free some space, or name another folder.",
    errno.EROFS: "; name another folder.",
    errno.EACCES: "; change its permissions, or name another folder.",
}


class OneLineErrors(click.Group):
    """Errors of input, files or missing packages are one line and exit code 2, and Ctrl-C is exit code 130."""

    def invoke(self, context: click.Context):
        try:
            return super().invoke(context)
        except BrokenPipeError:  # the reader, say head, has seen enough; click ends quietly
            raise
        except (ValueError, OSError, ModuleNotFoundError) as error:
            raise click.UsageError(f"{error}{WAYS_OUT.get(getattr(error, 'errno', None), '')}") from error
        except KeyboardInterrupt:
            click.echo("Interrupted.", err=True)
            context.exit(130)


@click.group(cls=OneLineErrors, context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.pass_context
def main(context: click.Context) -> None:
    """Run the notebooks of the Vision Transformer course, fetch its images, train models."""
    from vitlib.course.doctor import granted_cores, usable_cores

    for stream in (sys.stdout, sys.stderr):  # a pipe under Windows cannot hold every letter
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    # torch starts a thread for each core, even if a container grants fewer; the doctor reports what Jupyter meets
    if context.invoked_subcommand != "doctor" and granted_cores() < usable_cores():
        os.environ.setdefault("OMP_NUM_THREADS", str(granted_cores()))


with_parameters = click.option("--parameters", metavar="FILE", type=FILE, help="YAML file of parameters.")
with_given = click.option(
    "-p", "given", metavar="NAME VALUE", nargs=2, multiple=True, help="One parameter; wins over FILE."
)
with_timeout = click.option(
    "--timeout", metavar="SECONDS", type=LIMIT, default=3600, help="Longest time of one notebook; 0 is no limit."
)
with_notebooks = click.option(
    "--notebooks", metavar="DIR", type=FILE, help="Folder of the notebooks; the course's own without it."
)


@main.command()
@click.option("--only", metavar="03,04", help="Numbers or names of the notebooks to run; all without it.")
@with_parameters
@with_given
@click.option("--out", metavar="DIR", type=FILE, help="Folder of the run (see above).")
@with_timeout
@with_notebooks
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
        only=[word.strip() for word in (only or "").split(",") if word.strip()],
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
@with_parameters
@with_given
@click.option("--out", metavar="DIR", type=FILE, help="Folder of the sweep (see above).")
@click.option("--dry-run", is_flag=True, help="Print the runs and stop.")
@click.option("--scheduler", metavar="tcp://HOST:PORT", help="Dask scheduler; this machine's cores without it.")
@click.option("--workers", metavar="N", type=COUNT, help="Runs at a time; by cores and memory without it.")
@click.option("--threads-per-run", "threads", metavar="N", type=COUNT, help="Without it, cores / workers.")
@click.option("--retries", metavar="N", type=click.IntRange(0, 100), default=0, help="Per failed run.")
@with_timeout
def sweep(notebook, grid, zips, parameters, given, out, dry_run, scheduler, workers, threads, retries, timeout) -> None:
    """Run NOTEBOOK with every combination of parameters, several at a time, and gather the results.

    FILE.yaml holds the same as the options: notebook, grid, zip and parameters; options win. Without --out the sweep
    goes to runs/sweep-<name of NOTEBOOK or FILE>. There results.csv and results.json grow beside the executed
    notebooks; report.html is written at the end. The same command again runs what is missing or failed. The exit code
    is 0 when every run is finished, 1 when one failed, 2 for a wrong command, 130 after Ctrl-C.
    """
    from vitlib.course import grid as grids
    from vitlib.course import sweep as sweeps
    from vitlib.course.runner import parameters_from_file

    if scheduler and workers:
        raise click.UsageError("--workers is about this machine; the scheduler of --scheduler has workers of its own.")
    plan = grids.make_plan(
        notebook,
        grids.parse_axes(word for words in grid for word in words.split("\n")),
        [grids.parse_axes(words.split("\n")) for words in zips],
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
    sys.exit(0 if {run["status"] for run in results["runs"]} <= {"ok"} else 1)


@main.command()
@click.argument("name")
@click.option("--data-dir", metavar="DIR", help="Without it, VITLIB_DATA or the usual cache.")
def download(name, data_dir) -> None:
    """Fetch the images NAME (for instance cifair100), so that notebooks find them without a network."""
    from vitlib.data import load_images

    load_images(name, data_dir=data_dir)
    click.echo(f"{name} is ready.")


class TrainingCommand(click.Command):
    """A command whose options are parameters of the course, checked as the notebooks check them.

    Args:
        defaults: the default of each parameter. None for one that is not optional: the command chooses its value.
    """

    def __init__(self, *args, defaults: dict[str, object], **kwargs):
        super().__init__(*args, **kwargs)
        self.defaults = defaults

    def get_params(self, context: click.Context) -> list[click.Parameter]:
        return [*(_option(name, default) for name, default in self.defaults.items()), *super().get_params(context)]


def _option(name: str, default: object) -> click.Option:
    from vitlib.course.parameters import PARAMETERS  # loads torch

    parameter = PARAMETERS[name]
    kind = "|".join(parameter.choices) or parameter.type.__name__
    shown = "by the number of images" if default is None and not parameter.optional else default
    return click.Option(
        [f"--{name.replace('_', '-')}", name], metavar="", type=str, default=default, show_default=False,
        callback=lambda context, option, text: None if text is None else parameter.check(parameter.parse(text)),
        help=f"{parameter.help} [{kind}, default {shown}]",
    )  # fmt: skip


TRAINING = {
    "train_steps_per_epoch": None, "eval_steps_per_epoch": None, "validation_fraction": 0.1, "seed": 0,
    "device": "auto", "precision": "auto", "compile": False, "data_dir": None, "image_size": None,
}  # fmt: skip


@main.command(cls=TrainingCommand, defaults={
    "upstream": "cifair100", "preset": "small", "recipe": "modern", "norm_first": True, "pooling": "cls",
    "pretrain_epochs": 100, "batch_size": 128, **TRAINING, "run_dir": "runs/pretrain",
})  # fmt: skip
def pretrain(**parameters) -> None:
    """Train a new model and score its last weights on the test split, once.

    RUN_DIR gets pretrained.safetensors with the record of the run, pretrained-history.json, and the file from which
    the same command, called again, resumes an interrupted training.
    """
    from vitlib.course import training_commands

    training_commands.pretrain(**parameters)


@main.command(cls=TrainingCommand, defaults={
    "downstream": "cifair10", "weights": "cifar100-small", "recipe": "modern", "freeze_encoder": False,
    "finetune_epochs": None, "batch_size": None, **TRAINING, "run_dir": "runs/finetune",
})  # fmt: skip
def finetune(**parameters) -> None:
    """Move the encoder of WEIGHTS to other images, train it there and score it on their test split, once.

    WEIGHTS is a shipped name, a checkpoint, an official model such as vit_b_16, which is downloaded, or random: a new
    encoder of the small preset, trained from scratch as in pretraining, for comparison.

    RUN_DIR gets finetuned.safetensors and its record, predictions.csv with every test image, confusion.png, and
    mistakes.png with the most confident errors. An earlier training with other settings moves to a folder of its own.
    """
    from vitlib.course import training_commands

    training_commands.finetune(**parameters)


@main.command()
@click.argument("model")
@click.argument("images", metavar="IMAGE...", nargs=-1, required=True)
@click.option("--top", metavar="N", type=COUNT, default=5, help="Classes for each image.")
@click.option("--batch-size", metavar="N", type=COUNT, default=32, help="Images at once.")
@click.option("--csv", "table", metavar="FILE", type=FILE, help="Write a line for each image and class here, too.")
def predict(model, images, top, batch_size, table) -> None:
    """Print the classes that MODEL finds most probable for each IMAGE.

    MODEL is a checkpoint, such as finetune's runs/finetune/finetuned.safetensors, or a shipped name such as
    cifar100-small. An image that cannot be read gets one line on stderr, and the others are still predicted. The exit
    code is 0 when every image was predicted, 1 when one was not, 2 for a wrong command or MODEL.
    """
    from vitlib.classify import predict_files
    from vitlib.training import resolve_device
    from vitlib.utils import printable, write_csv
    from vitlib.weights import load_weights

    network, card = load_weights(model)
    rows = []
    for prediction in predict_files(network.to(resolve_device()), card, images, top=top, batch_size=batch_size):
        if prediction.error:
            click.echo(prediction.error, err=True)
            rows.append((prediction.path, "", "", "", prediction.error))
            continue
        click.echo(printable(prediction.path))
        for rank, (name, probability) in enumerate(prediction.classes, start=1):
            click.echo(f"  {probability:6.1%}  {name}")
            rows.append((prediction.path, rank, name, f"{probability:.4f}", ""))
    if table:
        write_csv(table, ("file", "rank", "class", "probability", "error"), rows)
    sys.exit(1 if any(error for *_, error in rows) else 0)


@main.command()
@click.argument("model")
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
        f"{out} ({out.expanduser().stat().st_size / 1e6:.1f} MB) takes uint8 images [batch, {shape}] and gives logits "
        f"[batch, {network.config['num_classes']}]; on random images they differ from the model's by at most "
        f"{difference:.1e} (allowed: {TOLERANCE:g})."
    )


@main.command()
@click.argument("folder", metavar="DIR", type=FILE)
@with_parameters
@with_given
@click.option("--out", metavar="DIR", type=FILE, default="runs/grades", help="For a new grades.csv and the copies.")
@click.option("--timeout", metavar="SECONDS", type=POSITIVE, default=600, help="Longest time for one notebook.")
@click.option("--memory", metavar="GIB", type=POSITIVE, default=4, help="Most memory for one notebook.")
@click.option("--jobs", metavar="N", type=COUNT, default=1, help="How many at once.")
@with_notebooks
@click.option("--roster", metavar="FILE", type=FILE, help="Text file with one name a line: who is missing?")
@click.option("--whole", is_flag=True, help="Run all cells, not only those that the checks need.")
def grade(folder, parameters, given, out, timeout, memory, jobs, notebooks, roster, whole) -> None:
    """Run the students' notebooks in DIR, and print a table of who passed which exercise.

    DIR holds ada/01_patching.ipynb, 01_patching_ada.ipynb or the like. The first line says whether bubblewrap contains
    their code. The course's own solutions of one chapter run first. Without --parameters smoke.yaml holds them.

    The exit code is 0 when every notebook ran to its end, 1 when one did not, 2 when nobody was graded (a wrong
    command, or the solutions fail), 130 after Ctrl-C (grades.csv keeps what was done).
    """
    from vitlib.course import grade as grading

    names = grading.read_roster(roster) if roster else ()
    found = grading.grade_folder(
        folder, out, notebooks=notebooks or grading.COURSE_FOLDER, parameters=parameters, given=dict(given),
        timeout=timeout, memory=memory, jobs=jobs, whole=whole, say=click.echo,
    )  # fmt: skip
    click.echo(f"\n{grading.tables(found, names)}\ngrades.csv and the executed copies are in {out}.")
    sys.exit(1 if any(one.stopped for one in found if one.chapter) else 0)


@main.command()
def doctor() -> None:
    """Print what this machine can do and what is missing."""
    from vitlib.course import doctor

    facts = doctor.gather()
    click.echo(doctor.report(facts))
    sys.exit(0 if doctor.can_run(facts) else 1)
