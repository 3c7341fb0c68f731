"""What tests share: servers in groups, scripted peers, callers without manners, checks of what was heard."""
