"""What the tests of an application need; nothing here imports a test framework."""

from sessionscope.testing._fault_proxy import Fault, FaultProxy
from sessionscope.testing._postgres import PostgresServer

__all__ = ["Fault", "FaultProxy", "PostgresServer"]
