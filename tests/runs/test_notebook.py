"""A real notebook, run cell by cell in a kernel of its own: what its reader sees of a run."""

import textwrap

import nbclient
import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook
from running import POINTS

CELLS = {
    "run": f"""
        import steploop
        summary = steploop.run({POINTS!r}, out="first", epochs=2, device="cpu")
        summary
    """,
    "again": f"steploop.run({POINTS!r}, out='first', epochs=2, device='cpu')",
    "interrupted": f"""
        import _thread

        def interrupt(step, values):  # as the button does
            if step == 4:
                _thread.interrupt_main()

        steploop.run({POINTS!r}, out="second", epochs=2, device="cpu", log_every=1, loggers=[interrupt])
    """,
    "resumed": "steploop.run(resume='second')",
    "recipe": """
        import torch
        from steploop import Optimizer, TrainState, backward_scaled, forward_loss, optimizer_step, unscale_and_clip
        from steploop.data import Loader
        from steploop.recipe import Recipe

        def objective(model, batch):
            return (model(batch) - 1).square().mean()

        def train_step(state, batch):
            state = backward_scaled(forward_loss(state, batch, objective))
            return optimizer_step(unscale_and_clip(state, max_norm=1.0))

        state = TrainState.create(torch.nn.Linear(2, 1), Optimizer(torch.optim.SGD, lr=0.1), seed=0)
        recipe = Recipe(state=state, train_step=train_step, epochs=2, objective=objective,
                        batches=Loader(torch.ones(8, 2), batch_size=4, seed=0))
        display(recipe, state)
        steploop.run(recipe)
    """,
}


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """The outputs of each cell."""
    cells = [new_code_cell(textwrap.dedent(code).strip()) for code in CELLS.values()]
    notebook = new_notebook(cells=cells)
    folder = {"metadata": {"path": str(tmp_path_factory.mktemp("notebook"))}}
    nbclient.NotebookClient(
        notebook, timeout=300, kernel_name="python3", allow_errors=True, resources=folder
    ).execute()
    nbformat.validate(notebook)
    return dict(zip(CELLS, (cell.outputs for cell in notebook.cells), strict=True))


def texts(outputs):
    """What stands in a cell below its code, as plain text."""
    return "\n".join(
        out.get("text", "")
        or out.get("data", {}).get("text/plain", "")
        or "\n".join(out.get("traceback", []))
        for out in outputs
    )


def test_a_run_shows_one_line_that_was_renewed_and_its_result_as_a_table_with_curves(outputs):
    *said, line, result = outputs["run"]
    assert {out.output_type for out in said} == {"stream"}
    assert (line.output_type, result.output_type) == ("display_data", "execute_result")
    assert "fp16 on cpu, first" in texts(said)
    assert "value='1.000'" in line.data["text/html"]
    assert "epoch 2/2 step 13" in line.data["text/plain"]
    assert result.data["text/html"].count("<svg") == 3  # training loss, loss and accuracy
    assert "\x1b" not in texts(outputs["run"])


def test_a_cell_that_is_run_again_says_what_to_do(outputs):
    error = outputs["again"][-1]
    assert error.ename == "RunExistsError"
    assert "first holds a run already" in error.evalue
    assert "Go on with it by steploop.run(..., resume='first')" in error.evalue


def test_the_stop_button_leaves_a_run_that_another_cell_resumes(outputs):
    stopped, resumed = (outputs[name][-1].data["text/html"] for name in ("interrupted", "resumed"))
    assert "Interrupted in epoch 1, after 4 steps" in stopped
    assert "steploop.run(..., resume=&#x27;second&#x27;)" in stopped
    assert "going on after step 4" in texts(outputs["resumed"])
    assert "Finished after 2 epochs, 14 steps" in resumed


def test_a_recipe_and_a_state_of_a_cell_show_as_tables_and_train(outputs):
    shown = [out.data.get("text/html", "") for out in outputs["recipe"] if out.output_type == "display_data"]
    assert (
        "<th style='text-align:left'>training</th><td style='text-align:left'>2 epochs of 2 batches</td>"
        in shown[0]
    )
    assert "<td style='text-align:left'>Linear of 3 parameters</td>" in shown[1]
    assert "epoch 0, batch 0" in shown[1]
    assert "Finished after 2 epochs, 4 steps" in outputs["recipe"][-1].data["text/html"]
