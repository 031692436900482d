"""x."""

from steploop.checkpoint.loading import load as load
from steploop.checkpoint.loading import open_checkpoint as open_checkpoint
from steploop.checkpoint.saving import digest as digest
from steploop.checkpoint.saving import save as save
