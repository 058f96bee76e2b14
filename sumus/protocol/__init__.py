"""The rounds of servers, edges and sites (`round`, `edge`, `site`) and the session of a device (`session`), as pure tables. They
use neither a clock nor IO.
"""
