"""What is compiled is tested on the release of torch that steploop.compile is written for."""

from compiled_runs import compile_runs_on_this_torch

collect_ignore_glob = [] if compile_runs_on_this_torch() else ["test_*.py"]
