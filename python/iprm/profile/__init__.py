"""Where an epoch's time goes, stage by stage."""
