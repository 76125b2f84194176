"""What knows both programs and costs: strategies, the cost network, recomputation. Start at `cost_network.py`."""
