"""Evidence on the paper's tasks: ``python -m simulations.evidence --glue DIR``.

CoLA and MRPC, learned by LoLa-DEFT and by FedAvg of the whole model from equal samples,
and what an accuracy of SST-2 costs both. Recipes and what is claimed of them are in
evidence.toml; each run is one of the GLUE app, and a finished one is not repeated.
"""
