"""TOML text to a `Recipe`; what is wrong in it is told in one sentence with the file and the line.

Neither `tomllib` nor pydantic knows where a key stands. `line_of` finds it with tomllib itself: the line is
the first at which the text so far, its open brackets closed, has the key.
"""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from secateur.errors import RecipeError, UnknownName
from secateur.recipe.parts import (
    BudgetPart,
    DataPart,
    DistillPart,
    FloorPart,
    LimitsPart,
    ModelPart,
    MovingPart,
    PenaltyPart,
    StagePart,
)
from secateur.recipe.schema import Cut, Recipe, Sparsify, Step, Train

KINDS = (Train, Sparsify, Cut)
NAMES = tuple((kind.model_fields["kind"].default, kind) for kind in KINDS)
PATH_SCHEMES = ("imagefolder", "parquet")
MUST = (
    ("int_type", "must be a whole number"),
    ("int_from_float", "must be a whole number"),
    ("int_parsing", "must be a whole number"),
    ("float_type", "must be a number"),
    ("float_parsing", "must be a number"),
    ("string_type", "must be a text in quotes"),
    ("bool_type", "must be true or false"),
    ("tuple_type", "must be a list in brackets"),
    ("model_type", "must be a table"),
    ("model_attributes_type", "must be a table"),
    ("literal_error", "must be {expected}"),
    ("too_short", "must have at least {min_length} element"),
    ("greater_than", "must be greater than {gt}"),
    ("greater_than_equal", "must be at least {ge}"),
    ("less_than", "must be less than {lt}"),
    ("less_than_equal", "must be at most {le}"),
)


def read_recipe(path: str | Path) -> Recipe:
    """The recipe in the TOML file `path`; its relative paths are read as relative to the file's folder.

    Raises `RecipeError` with the file and, where there is one, the line.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise RecipeError(f"there is no recipe {str(path)!r}; give the path of a TOML file.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"the recipe {str(path)!r} cannot be read as text: {error}.") from error
    return anchored(parse(text, str(path)), path.absolute().parent)


def embedded(name: str) -> Recipe:
    """One of the recipes that come with the package: "digits" or "report".

    >>> embedded("digits").model.source
    'secateur:digits_vgg'
    """
    return read_recipe(Path(__file__).with_name(f"{name}.toml"))


def parse(text: str, name: str = "recipe") -> Recipe:
    """The recipe that a TOML text says; `name` is what messages call it.

    >>> parse('[data]\\nsource = "digits"\\nvalidaton = 0.2\\n', "mine.toml")
    Traceback (most recent call last):
    secateur.errors.RecipeError: mine.toml, line 3: unknown key 'validaton' in [data]; did you mean ...
    """
    try:
        value = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"{name} is not TOML: {error}.") from error
    try:
        # As JSON, since pydantic's strict mode takes an array for a tuple only from there.
        return Recipe.model_validate_json(json.dumps(value, default=str), strict=True)
    except ValidationError as error:
        raise RecipeError(_sentence(error, text, name)) from error


def build(**parts: Any) -> Recipe:
    """A recipe made of arguments, such as the command line's; what is wrong is told as for a file."""
    try:
        return Recipe.model_validate(parts)
    except ValidationError as error:
        raise RecipeError(_sentence(error, "", "the options")) from error


def changed(
    recipe: Recipe,
    *,
    sparsity: float | None = None,
    epochs: int | None = None,
    budget: dict[str, float] | None = None,
) -> Recipe:
    """The recipe with another sparsity or budget in its pruning steps, or other epochs in its last training step.

    Raises `RecipeError` for a value that is out of range, and where no step takes it.
    """
    trains = [isinstance(step, Train) for step in recipe.steps]
    if sparsity is not None and all(isinstance(step, Train) or step.sparsity is None for step in recipe.steps):
        raise RecipeError("the recipe has no step that prunes by a sparsity, so one changes nothing; leave it out.")
    if budget is not None and not any(isinstance(step, Cut) for step in recipe.steps):
        raise RecipeError("the recipe has no step that cuts, so a budget changes nothing; leave it out.")
    if epochs is not None and not any(trains):
        raise RecipeError("the recipe has no training step, so epochs change nothing; leave them out.")
    try:
        recipe = recipe if sparsity is None else recipe.with_sparsity(sparsity)
        recipe = recipe if budget is None else recipe.with_budget(budget)
        return recipe if epochs is None else recipe.with_epochs(epochs)
    except ValidationError as error:
        raise RecipeError(_sentence(error, "", "the options")) from error


def anchored(recipe: Recipe, folder: Path) -> Recipe:
    """The recipe with the paths in it, those that are relative, taken from `folder`."""

    def absolute(path: str | None) -> str | None:
        return None if path is None else str((folder / Path(path).expanduser()).absolute())

    def images(source: str) -> str:
        scheme, _, rest = source.partition(":")
        return f"{scheme}:{absolute(rest)}" if scheme in PATH_SCHEMES and rest else source

    def anchor(step: Step) -> Step:
        if isinstance(step, Cut):
            return step.model_copy(update={"table": absolute(step.table)})
        if not isinstance(step, Train) or step.distill is None or step.distill.unlabelled is None:
            return step
        distill = step.distill.model_copy(update={"unlabelled": images(step.distill.unlabelled)})
        return step.model_copy(update={"distill": distill})

    data, model = recipe.data, recipe.model
    file, _, factory = model.source.rpartition(":")
    network = f"{absolute(file)}:{factory}" if file.endswith(".py") else model.source
    return recipe.model_copy(
        update={
            "data": data.model_copy(update={"source": images(data.source), "folder": absolute(data.folder)}),
            "model": model.model_copy(update={"source": network, "weights": absolute(model.weights)}),
            "steps": tuple(anchor(step) for step in recipe.steps),
        }
    )


def line_of(text: str, path: tuple[str | int, ...]) -> int | None:
    """The line, counted from 1, on which the key or element `path` of a TOML text stands.

    >>> line_of('a = 1\\n[b]\\nc = [\\n  {d = 1},\\n  {d = 2}]\\n', ("b", "c", 1, "d"))
    5
    """
    lines = text.splitlines()
    for count in range(1, len(lines) + 1):
        for closers in ("", "]", "]]"):
            try:
                value: Any = tomllib.loads("\n".join([*lines[:count], closers]))
                for key in path:
                    value = value[key]
            except (tomllib.TOMLDecodeError, KeyError, IndexError, TypeError):
                continue
            return count
    return None


def _sentence(error: ValidationError, text: str, name: str) -> str:
    """The most telling of pydantic's findings as a sentence, and how many more there are."""
    # A misspelt key is both unknown and missing; that it is unknown says more.
    all_findings = error.errors(include_url=False)
    # A list whose one item is wrong is also found too short.
    inner = [found for found in all_findings if found["type"] != "too_short"] or all_findings
    findings = sorted(inner, key=lambda found: found["type"] != "extra_forbidden")
    found, more = findings[0], len(findings) - 1
    path = tuple(found["loc"])
    kind = str(path[2]) if len(path) > 2 and path[0] == "steps" else None
    if kind:  # pydantic puts the chosen kind into the path, where the text has no key of that name
        path = path[:2] + path[3:]
    if found["type"] == "union_tag_invalid":
        path = (*path, "kind")
    shown = path[:-1] if found["type"] == "missing" else path
    line = line_of(text, shown) if shown else None
    rest = f" ({more} more {'problem' if more == 1 else 'problems'} after this one.)" if more else ""
    return f"{name}{f', line {line}' if line else ''}: {_said(found, path, kind)}{rest}"


def _said(found: Any, path: tuple[str | int, ...], kind: str | None) -> str:
    """What is wrong at `path`, and what is allowed there."""
    if found["type"] == "value_error" and not path:
        return str(found["ctx"]["error"])
    if found["type"] == "value_error":
        place = _table(path if isinstance(path[-1], str) else (*path, ""), kind)
        return f"in {place}, {found['ctx']['error']}"
    key, table, value, context = str(path[-1]), _table(path, kind), found["input"], found.get("ctx", {})
    if found["type"] == "extra_forbidden":
        said = str(UnknownName("key", key, _fields(path[:-1], kind)))
        return said.replace(repr(key), f"{key!r} in {table}", 1)
    if found["type"] == "missing":
        return f"{table} has no {key!r}, which it needs."
    if found["type"] == "union_tag_not_found":
        return f"step {int(key) + 1} has no 'kind'; choose one of {', '.join(dict(NAMES))}."
    if found["type"] == "union_tag_invalid":
        return str(UnknownName("kind of step", str(value.get("kind")), dict(NAMES)))
    if found["type"] == "literal_error" and isinstance(value, str):
        choices = [part.strip("' ") for part in context["expected"].replace(" or ", ", ").split(",")]
        return str(UnknownName(_label(path), value, choices))
    limits = {name: f"{limit:g}" if isinstance(limit, float) else limit for name, limit in context.items()}
    must = dict(MUST).get(found["type"], "must be different: " + found["msg"]).format(**limits)
    return f"{_label(path)} in {table} {must}, and is {json.dumps(value, default=str)}."


def _label(path: tuple[str | int, ...]) -> str:
    """What to call the value at `path`: its key, or the key of the array that it is an element of."""
    keys = [str(key) for key in path if isinstance(key, str)]
    return keys[-1] if keys else "the recipe"


def _table(path: tuple[str | int, ...], kind: str | None) -> str:
    """What to call the table that holds the key at the end of `path`."""
    if path[:1] == ("steps",) and len(path) > 2 and isinstance(path[1], int):
        step = f"step {path[1] + 1}" + (f" ({kind})" if kind else "")
        return f"a stage of {step}" if "stages" in path[:-1] else step
    return f"[{path[0]}]" if len(path) > 1 else "the recipe"


def _fields(path: tuple[str | int, ...], kind: str | None) -> list[str]:
    """The keys that the table at `path` may have."""
    part: type[BaseModel] = Recipe
    named: dict[str | int, type[BaseModel]] = {"data": DataPart, "model": ModelPart, "floor": FloorPart}
    if path and path[0] in named:
        part = named[path[0]]
    elif path[:1] == ("steps",):
        nested: dict[str | int, type[BaseModel]] = {
            "stages": StagePart,
            "distill": DistillPart,
            "penalty": PenaltyPart,
            "masks": MovingPart,
            "budget": BudgetPart,
            "limits": LimitsPart,
        }
        part = next((nested[key] for key in path if key in nested), dict(NAMES)[str(kind)])
    return list(part.model_fields)
