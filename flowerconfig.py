"""Flower's configuration, read where `celery -A celery_app flower` is started; options go before it.

Whoever is in can stop workers: it answers this host only, and only who knows the password.
"""

import os
import sys

address = "127.0.0.1"
# Arguments say how many messages of which queue a batch has, the result what became of them.
tasks_columns = "name,args,result,state,received,runtime,worker,uuid"
max_tasks = 10_000

if not os.environ.get("FLOWER_BASIC_AUTH") and not any("auth" in word for word in sys.argv):
    sys.exit("flower: set FLOWER_BASIC_AUTH=name:password first")
