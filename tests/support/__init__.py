"""What tests share: groups of servers, scripted peers, callers that break rules, and checks of what they received."""
