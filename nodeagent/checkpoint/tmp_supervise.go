package checkpoint

func (s *Session) supervise()       {}
func (s *Session) stopSupervising() {}
