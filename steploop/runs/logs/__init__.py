"""Logs: where the numbers of a run go (a file of JSON lines, the screen, TensorBoard, CSV), and the Logger interface."""

from steploop.runs.logs.csv_table import CsvTable as CsvTable
from steploop.runs.logs.jsonl import JsonLines as JsonLines
from steploop.runs.logs.jsonl import read_json_lines as read_json_lines
from steploop.runs.logs.loggers import Logger as Logger
from steploop.runs.logs.loggers import Loggers as Loggers
from steploop.runs.logs.tensorboard import TensorBoard as TensorBoard
