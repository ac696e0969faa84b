package fleet

import (
	"fmt"
	"time"
)

// Outcome says what a report changed.
type Outcome int

// Outcomes of a report.
const (
	Unchanged  Outcome = iota // nothing to store
	Progressed                // to be stored, but not worth an event: progress, a message
	Changed                   // to be stored, and watchers are told
)

// ApplyReport takes over what a node says of the session. Returns ErrStale if
// the node does not have the session, or the report is of an old assignment or
// of another session that had the same id, and ErrInvalidArgument for a state
// that is not known; then nothing is changed.
//
// A session that is being deleted stays DELETING whatever is reported. GONE
// means something only where deletion was asked for: it ends the assignment. In
// the same way a session that is asked to be suspended stays SUSPENDING until the
// node says SUSPENDED, which it says of no other; with object storage that ends the
// assignment, too.
func (s *Session) ApplyReport(r Report, node string, now time.Time) (Outcome, error) {
	a := s.Assignment
	switch {
	case a == nil || a.Node != node:
		return Unchanged, fmt.Errorf("%w: session %s is not on node %s", ErrStale, s.ID, node)
	case r.SessionUID != s.UID:
		return Unchanged, fmt.Errorf("%w: session %s is not the one of uid %s", ErrStale, s.ID, r.SessionUID)
	case r.Generation != a.Generation:
		return Unchanged, fmt.Errorf("%w: session %s is at generation %d, the report is of %d", ErrStale, s.ID, a.Generation, r.Generation)
	case r.State == ReportedGone && !a.Delete:
		return Unchanged, fmt.Errorf("%w: session %s is not to be deleted", ErrStale, s.ID)
	case (r.State == ReportedSuspending || r.State == ReportedSuspended) && !s.Deleting && !(s.Suspended && a.Suspend):
		return Unchanged, fmt.Errorf("%w: session %s is not to be suspended", ErrStale, s.ID)
	}
	before, assigned := *s, *a
	s.takeStorage(r.Storage)
	var err error
	switch {
	case r.State == ReportedGone:
		// Most nodes have marked it as deleted in its object storage, but not one that
		// never had it there, or had let go of it before: that is looked at.
		s.Assignment = nil
		err = s.SetState(StateDeleting, "", "")
	case a.Delete:
		err = s.applyDeleting(r)
	case s.Deleting: // the node has not been asked yet
		err = s.SetState(StateDeleting, s.Reason, s.Message)
	case s.Suspended:
		err = s.applySuspending(r)
	case s.renewed() && s.State != StateLost:
		err = s.SetState(s.State, s.Reason, s.Message)
	default:
		err = s.applyRunning(r, now)
	}
	if err != nil {
		*a = assigned
		*s = before
		return Unchanged, err
	}
	outcome := s.changedSince(&before)
	if outcome != Unchanged {
		s.UpdateTime = now
	}
	return outcome, nil
}

// applyDeleting keeps what the node says of why it cannot delete yet. That the
// node cannot be reached is not the node's to say or to take back.
func (s *Session) applyDeleting(r Report) error {
	reason, message := r.Reason, r.Message
	if reason == "" && s.Reason == ReasonNodeUnreachable {
		reason, message = s.Reason, s.Message
	}
	return s.SetState(StateDeleting, reason, message)
}

// applySuspending keeps why it cannot be saved or stopped yet. A session that is
// suspended already is so whatever comes late.
func (s *Session) applySuspending(r Report) error {
	switch {
	case r.State == ReportedSuspended:
		if err := s.SetState(StateSuspended, r.Reason, r.Message); err != nil {
			return err
		}
		if s.Spec.Storage.Remote() {
			s.leaveNode()
		}
		return nil
	case s.State == StateSuspended:
		return nil
	case r.State == ReportedSuspending || r.State == ReportedFailed:
		if err := s.SetState(StateSuspending, r.Reason, r.Message); err != nil {
			return err
		}
		s.takeProgress(r)
		return nil
	}
	// The node has not heard of it yet.
	return s.SetState(StateSuspending, s.Reason, s.Message)
}

// takeStorage: a node that names no checkpoint does not know of one yet, and what
// was saved stays saved.
func (s *Session) takeStorage(n *StorageStatus) {
	if n == nil {
		return
	}
	n = n.Clone()
	if n.Checkpoint == nil && s.Storage != nil {
		n.Checkpoint = s.Storage.Checkpoint
	}
	s.Storage = n
}

func (s *Session) takeProgress(r Report) {
	s.Progress = nil
	if r.Progress != nil {
		p := *r.Progress
		s.Progress = &p
	}
}

func (s *Session) applyRunning(r Report, now time.Time) error {
	states := map[ReportedState]State{
		ReportedStarting: StateStarting, ReportedRunning: StateRunning, ReportedFailed: StateFailed,
	}
	state, ok := states[r.State]
	if !ok {
		return fmt.Errorf("%w: reported state %q of session %s is not known", ErrInvalidArgument, r.State, s.ID)
	}
	was := s.State
	if err := s.SetState(state, r.Reason, r.Message); err != nil {
		return err
	}
	if state == StateStarting {
		s.takeProgress(r)
	}
	if a := s.Assignment; state == StateRunning && a.carries(s) {
		// Done. The same may be asked for again.
		s.RestoreCheckpoint, s.RestoreGeneration = "", 0
		a.RestoreCheckpoint, a.RestoreGeneration = "", 0
	}
	s.RestartCount = r.RestartCount
	if r.OpenCodeVersion != "" {
		s.OpenCodeVersion = r.OpenCodeVersion
	}
	// The last time it became ready stays known while it starts again.
	switch {
	case !r.ReadyTime.IsZero():
		s.ReadyTime = r.ReadyTime
	case state == StateRunning && was != StateRunning:
		s.ReadyTime = now
	}
	return nil
}

func (s *Session) changedSince(b *Session) Outcome {
	storage := b.Storage.compare(s.Storage)
	switch {
	case storage == Changed:
		return Changed
	case s.State != b.State || s.Reason != b.Reason || s.phase() != b.phase() ||
		s.RestartCount != b.RestartCount || !s.ReadyTime.Equal(b.ReadyTime):
		return Changed
	case storage == Progressed || s.RestoreCheckpoint != b.RestoreCheckpoint || s.Message != b.Message || s.OpenCodeVersion != b.OpenCodeVersion || s.Assignment != b.Assignment ||
		(s.Progress != nil && *s.Progress != *b.Progress): // the phases are equal, so both are there or neither
		return Progressed
	}
	return Unchanged
}

// phase of the start; "-" tells no progress from a progress without a phase.
func (s *Session) phase() string {
	if s.Progress == nil {
		return "-"
	}
	return s.Progress.Phase
}
