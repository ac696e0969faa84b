package fleet

import (
	"fmt"
)

// Change says what a report did to a session.
type Change int

// What a report can do.
const (
	Unchanged Change = iota // nothing to write
	Updated                 // numbers changed: write it, tell nobody
	Moved                   // state, reason or phase changed: write it and tell the watchers
)

// ApplyReport takes in what a node says of the session. Returns ErrStale if the
// report is of another session with the same id, another node or another
// generation; then nothing is changed.
func (s *Session) ApplyReport(r Report, node string) (Change, error) {
	a := s.Assignment
	switch {
	case r.SessionUID != s.UID:
		return Unchanged, fmt.Errorf("%w: session %s is another one by now", ErrStale, s.ID)
	case a == nil || a.Node != node:
		return Unchanged, fmt.Errorf("%w: session %s is not assigned to node %s", ErrStale, s.ID, node)
	case a.Generation != r.Generation:
		return Unchanged, fmt.Errorf("%w: session %s is at generation %d, not %d", ErrStale, s.ID, a.Generation, r.Generation)
	}
	if r.State == ReportedGone {
		if !a.Delete {
			return Unchanged, fmt.Errorf("%w: session %s was not to be removed", ErrStale, s.ID)
		}
		s.Assignment = nil
		return Moved, nil
	}
	before := *s
	state := map[ReportedState]State{
		ReportedStarting: StateStarting, ReportedRunning: StateRunning, ReportedFailed: StateFailed,
	}[r.State]
	switch {
	case state == "":
		return Unchanged, fmt.Errorf("%w: a node reported the unknown state %q", ErrInvalidArgument, r.State)
	case s.State == StateDeleting:
		state = StateDeleting // whatever it does until it is gone
		if r.Reason == "" && s.Reason != "" {
			r.Reason, r.Message = s.Reason, s.Message
		}
	}
	if err := s.SetState(state, r.Reason, r.Message); err != nil {
		return Unchanged, err
	}
	if state == StateStarting {
		s.Progress = r.Progress
	}
	s.RestartCount, s.OpenCodeVersion = r.RestartCount, r.OpenCodeVersion
	s.ReadyTime = r.ReadyTime
	switch {
	case s.State != before.State || s.Reason != before.Reason || s.RestartCount != before.RestartCount || phase(s.Progress) != phase(before.Progress):
		return Moved, nil
	case s.Message != before.Message || !s.ReadyTime.Equal(before.ReadyTime) || s.OpenCodeVersion != before.OpenCodeVersion || !sameProgress(s.Progress, before.Progress):
		return Updated, nil
	}
	return Unchanged, nil
}

func phase(p *Progress) string {
	if p == nil {
		return ""
	}
	return p.Phase
}

func sameProgress(a, b *Progress) bool {
	if a == nil || b == nil {
		return a == b
	}
	return *a == *b
}

