"""Save and load states; a checkpoint survives crashes, power loss and hostile files.

    digest = checkpoint.save(state, "run/half")
    state = checkpoint.load("run/half", like=TrainState.create(model, optimizer))

A state may also be several by name, ``{"generator": g, "discriminator": d}``. To begin a new training with the weights of
another one, or of a file that somebody else wrote:

    state = checkpoint.load_weights("resnet18.safetensors", into=state, partial=["fc.*"])

**The format, version 1.** A checkpoint is a directory of four regular files (version 2: or more); any other name in it is an error. A
directory whose name begins with a dot is none: ``.tmp-*`` is being written, ``.old-*`` being replaced, ``.trash-*``
being deleted, ``.corrupt-*`` was found damaged. No pickle is in it, and nothing in it names code.

``model.safetensors``
    Parameters, and the buffers that the module's ``state_dict`` has, under the names of ``named_parameters()`` and
    ``named_buffers()``. Of several states each name begins with the state's: ``generator.fc.weight``, as in an
    ``nn.ModuleDict``. Plain ``safetensors.torch.load_file`` reads it, and the plain module takes it. A parameter in
    several places of a module (tied) stands once, under its first name.

``optimizer.safetensors``
    All other tensors: what the optimizer keeps (``slots.fc.weight.exp_avg``), averaged weights (``ema.fc.weight``),
    buffers that are not persistent (``buffers.name``), hyperparameters that are tensors (``hyper.0.lr``).

``state.json``
    All that is not a tensor. One JSON object: UTF-8, keys sorted, one line for each key of the outermost object,
    no other white space than one space after its colons, non-ASCII characters escaped. Its keys:

    - ``format``: ``"steploop checkpoint"``; ``version``: 1.
    - ``sha256``: of this file with 64 zeros in this place: the *digest* of the checkpoint. Equal states have equal ones.
    - ``files``: file name -> ``{"sha256": of all its bytes, "size": in bytes}``.
    - ``tensors``: file name -> tensor name -> ``{"dtype", "shape", "stride"}``: torch's name of the dtype, and the strides
      in elements where they are those of a permuted row-major tensor (channels_last).
    - ``metadata``: file name -> the text that stands as the one entry ``steploop`` of ``__metadata__`` in the file's
      header: JSON with ``aliases`` (other name of a tied parameter -> its first name) and ``complex128`` (names).
    - ``state``: ``{"several": bool, "states": {name: values}}``; a single state has the name ``""``. The values:
      the counters and the cursor (``applied_steps``, ``attempted_steps``, ``nonfinite_steps``, ``epoch``, ``batch``,
      ``seed``), ``precision``; ``scale``, ``early_stopping``, ``plateau``, ``best``: an object of numbers or null;
      ``params`` and ``buffers``: the names in order; ``optimizer``: the name of its class; ``groups``: the
      parameter names of each group; ``hyper``: the hyperparameters of each; ``slots``: parameter -> slot -> value;
      ``ema`` and ``transient_buffers``: name -> tensor; and where frozen parameters are not saved, ``left_out``: name -> the
      SHA-256 of shape, dtype and values of each.

    In ``hyper``, ``slots``, ``ema``, ``transient_buffers`` and the objects of numbers a value that JSON lacks is an
    object of one key: ``{"tuple": [...]}``, ``{"dict": [[key, value], ...]}`` in order, ``{"float": "nan"}`` (or
    ``"inf"``, ``"-inf"``), ``{"tensor": name}``, which stands in ``optimizer.safetensors`` (after the state's own name
    and a dot, if there are several).

``environment.json``
    Where, when, by whom and with which versions it was written; sealed by a ``sha256`` in the same way. It does not
    belong to the digest. An exact resume needs the same environment, and ``load`` says where it differs.

**The format, version 2**, is what a state that has ranks is saved as, whatever their number. A state without ranks is saved as
version 1, with the bytes and the digests that it always had; each version loads into either kind of state.

- Each tensor has one owner, the ranks that write are the first ones, as many as get 64 MiB each, and each writes its part of
  the two tables into a file of its own: ``model-00001-of-00004.safetensors``, ``optimizer-00003-of-00004.safetensors``. Owners
  follow from the tables: the heaviest tensor goes to the rank that has least, and so on. What one rank writes alone has the names
  of version 1. A tensor that is sharded is put together by its owner, one at a time: files hold whole tensors.
- ``model.safetensors.index.json`` (and that of the optimizer), where there are several files: ``weight_map``, tensor -> file, as
  Hugging Face has it.
- ``state.json`` has ``version`` 2, and other contents under three keys. ``tensors``: the two tables, with the ``sha256`` of each
  tensor's values as they are stored. ``files``: file name -> ``{"table": ..., "tensors": names}``. ``digest``: the SHA-256 of this
  JSON without ``digest``, ``files`` and ``sha256``: the *digest* of the state, which depends neither on the number of ranks nor on
  files. ``metadata`` is that of the whole tables; a file's header has the part that speaks of its tensors.
- ``environment.json`` has the number of ``parts`` besides.

Every rank writes and flushes its own files in the one temporary directory, tells the others the digests or what went wrong, and rank 0
writes ``state.json``, flushes and renames. To load, each file is read and verified by one rank; when all are verified, tensors
go to the ranks that need them.

**The safetensors files** are written here, in the canonical form: the length of the header (8 bytes, little-endian),
the header without white space, padded by spaces to a multiple of 8, first ``__metadata__``, then the tensors ordered by
dtype (U64, I64, F64, C64, F32, U32, I32, BF16, F16, U16, I16, F8_E5M2FNUZ, F8_E4M3FNUZ, F8_E4M3, F8_E5M2, I8, U8, BOOL) and then
by name (code points), without gaps; then the values, row-major. complex128 is stored as float64
with a last axis of 2 (real, imaginary). The header follows from the table in ``state.json``, and a reader compares.

**Limits.** 16 MiB of header and 100,000 tensors a file, 16 axes; ``state.json`` 64 MiB, 32 levels deep, whole numbers
below 2**64 and counts below 2**53.

**What is refused.** A state with a nan or an inf in a trained parameter, unless ``save`` gets ``require_finite=False``: no run
can go on from it, and it would push out an older, good checkpoint. Buffers may hold any value.

**What is not promised.** Power-loss safety on a disk that lies about flushing, or on a network file system.
Authenticity: the digests find damage, not somebody who rewrites all of a checkpoint; compare the digest with one kept
elsewhere. Equal bits on another machine type, torch version, number of threads or device.
"""

from steploop.checkpoint.background import BackgroundSaver as BackgroundSaver
from steploop.checkpoint.loading import load as load
from steploop.checkpoint.opening import Checkpoint as Checkpoint
from steploop.checkpoint.opening import open_checkpoint as open_checkpoint
from steploop.checkpoint.provenance import InexactResumeWarning as InexactResumeWarning
from steploop.checkpoint.saving import digest as digest
from steploop.checkpoint.saving import save as save
from steploop.checkpoint.store import CheckpointStore as CheckpointStore
from steploop.checkpoint.store import DamagedCheckpointWarning as DamagedCheckpointWarning

__all__ = [
    "BackgroundSaver",
    "Checkpoint",
    "CheckpointStore",
    "DamagedCheckpointWarning",
    "InexactResumeWarning",
    "digest",
    "load",
    "open_checkpoint",
    "save",
]
from steploop.checkpoint.weight_table import WeightTable as WeightTable
from steploop.checkpoint.weights import load_weights as load_weights
