"""Bench: what a decode step and a generation cost here, beside the forms that torch users run.

shapes --layers--> caches and queries --gate--> contenders that are right --clock--> rows

A contender whose result is wrong gets no timing. All contenders of a run take turns, so that what
the machine does besides hits all of them. Nothing here knows a framework: a generation is measured
through a protocol that the command line fills in.
"""
