"""What is refused, in families: one code for all refusals that a user answers in the same way."""

from __future__ import annotations

from enum import Enum


class Code(str, Enum):
    """A family of refusals. Its value is the code that messages show; a code never changes its meaning.

    Attributes:
        heading: the family in a few words.
        meaning: what the compiler found, in a sentence.
        way_out: what to do about it.
    """

    heading: str
    meaning: str
    way_out: str

    def __new__(cls, code: str, title: str, meaning: str, way_out: str) -> Code:
        member = str.__new__(cls, code)
        member._value_ = code
        member.heading, member.meaning, member.way_out = title, meaning, way_out
        return member

    def __str__(self) -> str:
        return str(self.value)

    # the schedule and the call
    SCHEDULE = (
        "RSC-101",
        "The schedule cannot mean anything",
        "A value of the schedule, or the file that holds it, is of the wrong kind, out of range or unknown.",
        "Write the value as the message says.",
    )
    UNREAD_OPTION = (
        "RSC-102",
        "Options that do not go together",
        "Two parts of the schedule exclude each other, or nothing in this model or schedule reads an option.",
        "Remove the option that the message names.",
    )
    NO_SUCH_PART = (
        "RSC-103",
        "The model has no such part",
        "A block, stage, layer, token or vision tower is named that the model does not have, or not once.",
        "`print(rs_compile.explain(model, inputs))` lists blocks and stages; name one of these.",
    )
    TOO_MANY = (
        "RSC-104",
        "More would leave than can",
        "The schedule takes more tokens, rows or columns out at one place than may leave there.",
        "Keep more there, and let the rest leave in later blocks.",
    )
    NOT_CALLED = (
        "RSC-105",
        "Nothing to report yet",
        "The model is compiled at its first call and measured only with a guard; neither has happened.",
        'Call the model once, then ask; for times, `optimize(..., guard="measure")`.',
    )
    INPUTS = (
        "RSC-106",
        "The call does not fit the model",
        "The call has no tensor, arguments that `forward` does not take, or a constant input that cannot be one.",
        "Call it with the arguments of the model itself.",
    )
    # running and capturing the model
    DOES_NOT_RUN = (
        "RSC-201",
        "The model does not run on these inputs",
        "The model itself raises, or its weights are not loaded.",
        "The message says which form of the inputs would do, where one was found by trying; else mend the call.",
    )
    NOT_TRACED = (
        "RSC-202",
        "torch.export cannot capture a line",
        "The model runs, but a line of it is no op that torch.export can record.",
        "Rewrite the line that the message names, or optimize the part of the model that it is not in.",
    )
    DATA_DEPENDENT = (
        "RSC-203",
        "A size or a branch depends on the data",
        "A graph holds fixed sizes, and the model computes one, or decides what to do, from the values of its inputs.",
        "Pass `constant_inputs=` where an input is always the same, or take a fixed number of tokens (`topk`).",
    )
    KEPT_STATE = (
        "RSC-204",
        "The model reads what its last call left",
        "A graph has inputs and outputs alone, and the model keeps a value between calls.",
        "Pass that value as an input and return it, or call the model once before where it only fills a cache.",
    )
    NOT_THE_MODEL = (
        "RSC-205",
        "The graph is not the model",
        "The captured or rewritten graph was run once beside the model, and they gave different results.",
        "Look at the line that the message names: it does something else while it is traced, or on another size.",
    )
    SURROUNDED = (
        "RSC-206",
        "Something else stands around the model",
        "Another tracer, a global hook or a graph break keeps the compiler from seeing the whole model.",
        "Call `rs_compile.optimize(model, schedule)` by itself, or remove the hook.",
    )
    # where tokens could leave
    NO_BLOCK = (
        "RSC-301",
        "No block to prune",
        "Blocks are found by dataflow, as residual branches of linear layers or convolutions, and there is none.",
        "`print(rs_compile.explain(model, inputs))` says what was found; a CNN wants `Schedule(grid=...)`.",
    )
    NOT_A_SEQUENCE = (
        "RSC-302",
        "The stream is no sequence of tokens",
        "Tokens leave a stream [batch, tokens, channels], or a grid of them; this is neither, or all must stay.",
        "Schedule blocks of another stream; `explain` shows them all.",
    )
    UNKNOWN_ORIGIN = (
        "RSC-303",
        "Which tokens must stay is not known",
        "Learned tokens (a class token, registers) stay, and these could not be followed to where they come from.",
        "Name those that must stay: `Schedule(keep, protected=(0,))`, or `protected=()` where none must.",
    )
    PADDING = (
        "RSC-304",
        "A mask may hide padding",
        "Padding leaves first and never merges into a real token; here it is not known which tokens the mask hides.",
        "Call without a mask where nothing is padded, or prune instead of merging.",
    )
    # ops that tokens, rows and columns go through
    NO_RULE = (
        "RSC-401",
        "No rule for an op",
        "No rule proves what this op does to fewer tokens, or the rule of a user's op declines.",
        "Prune after a later block, or teach it: [rules for your own ops](rules.md).",
    )
    WRONG_RULE = (
        "RSC-402",
        "A rule says something else than the op does",
        "The op was tried on fewer tokens, and does not run, or gives another shape than its rule promised.",
        "Mend the rule where it is yours; else prune after a later block, and please report it.",
    )
    EVERY_TOKEN = (
        "RSC-403",
        "An op needs every token",
        "The op mixes tokens by their position or number, so it would mean something else on fewer of them.",
        "Prune after a later block, behind which no such op stands; or leave out the output that needs it.",
    )
    PICKS_A_TOKEN = (
        "RSC-404",
        "An op picks a token by its number",
        "The model reads or splits tokens at a fixed position, and the token there may have left or moved.",
        "Prune after a later block, behind that op. Tokens at either end that only the last layers read stay anyway.",
    )
    SAMPLES_MEET = (
        "RSC-405",
        "The samples of a batch meet",
        "Each sample keeps tokens of its own, so entries of different samples cannot be paired, joined or summed.",
        "Prune behind that op, or optimize the part of the model without it.",
    )
    IN_PLACE = (
        "RSC-406",
        "An op writes in place",
        "The op writes into memory of which a shorter copy is made, and the copy would not see it.",
        "Write the op out of place: `x = x + y` for `x += y`.",
    )
    OTHER_SEQUENCE = (
        "RSC-407",
        "Two sequences meet",
        "A value is paired with tokens by position, and it is not known to have an entry for each of the same tokens.",
        "Prune behind the place where they meet, or build that value from the pruned tokens.",
    )
    FORM = (
        "RSC-408",
        "An op in a form that no rule follows",
        "The op is known, but not with these arguments.",
        "Write it in the ordinary form, or prune behind it.",
    )
    # rows and columns
    FIXED_GRID = (
        "RSC-501",
        "The size of a map is fixed",
        "The model's code holds a size of the map, or computes one that is not right on a smaller map.",
        "Let the numbers of rows and columns leave that the message names, or cut a later stage.",
    )
    NEEDS_THE_MAP = (
        "RSC-502",
        "An op needs the whole map",
        "The op reads rows and columns in a way that would mean something else where some have left.",
        "Cut a later stage, whose map no such op reads, or optimize the part of the model before it.",
    )
    # scores and mergers
    NO_SCORE = (
        "RSC-601",
        "The block has not what the score reads",
        "The score needs an attention map, a class token, a mixer or a second block, and this block has none.",
        '`score=Shift()` reads what every block has; for a stage of one block, `GridPrune(against="shortcut")`.',
    )
    NO_MERGE = (
        "RSC-602",
        "The merger does not fit the block",
        "The merger needs queries, keys or a place in the block that is not there, or changes the order of tokens.",
        "`Schedule(merge=..., by=Stream())`, which merges after the complete block in order; or prune.",
    )
    SIZES = (
        "RSC-603",
        "A layer cannot count merged tokens",
        "Merged tokens count as many in attention and means, and this layer has no place for their sizes.",
        "`by=Stream(size_bias=False, weighted_mean=False)`, or prune instead of merging.",
    )
    TRAIN_MODE = (
        "RSC-604",
        "The model is in train mode",
        "Dropout or batch statistics make the result depend on chance or on the batch.",
        "`model.eval()` before.",
    )
    # what comes out
    OUTPUTS = (
        "RSC-701",
        "An output cannot be given like this",
        "The model does not return the output that is asked for, or it cannot be given short or at full length.",
        'Name outputs that the model returns; `token_outputs="restore"` gives every token back.',
    )
    NO_MAP = (
        "RSC-702",
        "Scores cannot be drawn on the image",
        "Score maps are drawn where each token is a patch of one still image, and these tokens are not.",
        "`rs_compile.optimize` prunes such a model all the same; only the picture is missing.",
    )
    # files and commands
    COMMAND = (
        "RSC-801",
        "An option of a command cannot be followed",
        "A file, a device or a value of the command line is not usable here.",
        "Write the option as the message says; `--help` lists them.",
    )
    MISSING = (
        "RSC-802",
        "A package is missing",
        "This part needs a package that is not installed.",
        "Install the extra that the message names.",
    )
    MODEL_FILE = (
        "RSC-803",
        "A model or an image cannot be loaded",
        "There is no such model, checkpoint or image, or it is not of the form that is read.",
        "The message lists what there is, or which form it must have.",
    )
    EXPORT = (
        "RSC-804",
        "The model cannot be exported like this",
        "The format, the mode or the inputs do not fit the file that is to be written.",
        "See [files for other runtimes](export.md); the message names what fits.",
    )
    PICTURES = (
        "RSC-805",
        "A search or an embedding cannot go on",
        "The pictures, the target or the settings of `search` or `embed` do not fit together.",
        "The message says which one, and what to write instead.",
    )
    FAULT = (
        "RSC-999",
        "A fault of the compiler",
        "Something was raised, or a check between passes failed, that should not.",
        "The model is as it was and runs unoptimized; please report the message with its traceback.",
    )
