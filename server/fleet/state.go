package fleet

import (
	"fmt"
	"maps"
	"slices"
	"time"
)

// States lists all states of a session.
var States = []State{
	StatePending, StateStarting, StateRunning, StateFailed, StateLost, StateDeleting, StateSuspending, StateSuspended,
}

// moves says which state may follow which. Staying in a state is always allowed.
var moves = map[State][]State{
	"":            {StatePending}, // made
	StatePending:  {StateStarting, StateDeleting, StateSuspended},
	StateStarting: {StateRunning, StateFailed, StateLost, StateDeleting, StateSuspending, StateSuspended},
	StateRunning:  {StateStarting, StateFailed, StateLost, StateDeleting, StateSuspending, StateSuspended},
	StateFailed:   {StateStarting, StateRunning, StateLost, StateDeleting, StateSuspending, StateSuspended},
	// Given up on its node, it is PENDING again.
	StateLost:       {StatePending, StateStarting, StateRunning, StateFailed, StateDeleting, StateSuspending, StateSuspended},
	StateDeleting:   nil, // final: what follows is that the session is gone
	StateSuspending: {StateStarting, StateLost, StateDeleting, StateSuspended},
	StateSuspended:  {StatePending, StateStarting, StateDeleting},
}

// CanBecome says whether a session in state s may move to another state.
func (s State) CanBecome(to State) bool { return s == to || slices.Contains(moves[s], to) }

// SetState moves the session, with the reason and what a person should know.
// Everything that changes a state does it here. Returns ErrFailedPrecondition if
// the state does not allow the move; then nothing is changed. Progress is kept
// only while the session starts or is being suspended.
func (s *Session) SetState(to State, reason, message string) error {
	if !s.State.CanBecome(to) {
		return fmt.Errorf("%w: session %s is %s and cannot become %s", ErrFailedPrecondition, s.ID, s.State, to)
	}
	s.State, s.Reason, s.Message = to, reason, message
	if to != StateStarting && to != StateSuspending {
		s.Progress = nil
	}
	return nil
}

// Suspend asks for the session to be suspended. Asked again it changes nothing.
// Returns ErrFailedPrecondition while the session is being deleted or is lost.
func (s *Session) Suspend(now time.Time) error {
	switch {
	case s.Deleting:
		return fmt.Errorf("%w: session %s is being deleted", ErrFailedPrecondition, s.ID)
	case s.Suspended:
		return nil
	case s.State == StateLost:
		return fmt.Errorf("%w: session %s is LOST: node %s cannot save it while it cannot be reached", ErrFailedPrecondition, s.ID, s.node())
	}
	to, message := StateSuspending, "It is being saved, and then stopped."
	if s.Assignment == nil {
		to, message = StateSuspended, "" // nothing is anywhere that would have to end
	}
	if err := s.SetState(to, "", message); err != nil {
		return err
	}
	s.Suspended, s.Progress, s.UpdateTime = true, nil, now
	return nil
}

// Resume asks for the session to run. One that is lost and in object storage is
// given up on its node: it is placed again, and the next generation keeps the old
// node from writing. A session that runs is left alone. Returns
// ErrFailedPrecondition while the session is being deleted, or is lost with its
// workspace.
func (s *Session) Resume(now time.Time) error {
	switch {
	case s.Deleting:
		return fmt.Errorf("%w: session %s is being deleted", ErrFailedPrecondition, s.ID)
	case s.State == StateLost && !s.Spec.Storage.Remote():
		return fmt.Errorf("%w: session %s is LOST and its files are on node %s alone: it goes on when that returns", ErrFailedPrecondition, s.ID, s.node())
	case s.State != StateLost && !s.Suspended:
		return nil
	}
	to, message := StateStarting, "It is being resumed."
	if s.State == StateLost || s.Assignment == nil {
		to, message = StatePending, "A node is being chosen."
	}
	if err := s.SetState(to, "", message); err != nil {
		return err
	}
	if to == StatePending {
		s.leaveNode()
	}
	s.Suspended, s.Progress, s.UpdateTime = false, nil, now
	return nil
}

// Restore asks for the session to be taken back to a checkpoint, and to run then.
// Returns ErrFailedPrecondition while it is being deleted or is lost.
func (s *Session) Restore(checkpoint string, now time.Time) error {
	switch {
	case s.Deleting:
		return fmt.Errorf("%w: session %s is being deleted", ErrFailedPrecondition, s.ID)
	case s.State == StateLost:
		return fmt.Errorf("%w: session %s is LOST: node %s cannot save it as it is while it cannot be reached; resume it first", ErrFailedPrecondition, s.ID, s.node())
	case s.RestoreCheckpoint == checkpoint && !s.Suspended:
		return nil
	}
	if err := s.Resume(now); err != nil {
		return err
	}
	if s.Assignment != nil {
		if err := s.SetState(StateStarting, "", fmt.Sprintf("It is being taken back to checkpoint %s.", checkpoint)); err != nil {
			return err
		}
		s.Progress = nil
	}
	s.RestoreCheckpoint, s.RestoreGeneration, s.UpdateTime = checkpoint, s.Generation+1, now
	return nil
}

// GiveUp ends the assignment of a session that is being deleted, is in object
// storage, and whose node cannot be reached: what that has not saved is not waited
// for. It says whether it did so.
func (s *Session) GiveUp(now time.Time) bool {
	if !s.Deleting || s.Assignment == nil || s.Reason != ReasonNodeUnreachable || !s.Spec.Storage.Remote() {
		return false
	}
	s.leaveNode()
	s.Reason, s.Message, s.UpdateTime = "", "", now
	return true
}

// renewed says that the node is about to get the next generation: what it says of
// this one is old.
func (s *Session) renewed() bool {
	a := s.Assignment
	return a.Suspend && !s.Suspended || s.AwaitsRestore()
}

// AwaitsRestore says of a session that is on a node that this has not been told yet
// what to take it back to.
func (s *Session) AwaitsRestore() bool {
	return s.RestoreCheckpoint != "" && !s.Assignment.carries(s)
}

// carries says whether the assignment is of the restore that was asked for last.
func (a *Assignment) carries(s *Session) bool {
	return a.RestoreCheckpoint == s.RestoreCheckpoint && a.RestoreGeneration == s.RestoreGeneration
}

// leaveNode ends the assignment. What the node said of its mounts, and of what it
// could not save, is over with it.
func (s *Session) leaveNode() {
	s.Assignment = nil
	if s.Storage != nil {
		s.Storage = &StorageStatus{Checkpoint: s.Storage.Clone().Checkpoint}
	}
}

func (s *Session) node() string {
	if s.Assignment == nil {
		return ""
	}
	return s.Assignment.Node
}

// AwaitsStorage says of a session that is being deleted and on no node that its
// object storage does not know of that yet.
func (s *Session) AwaitsStorage() bool {
	return s.Deleting && s.Assignment == nil && s.Spec.Storage.Remote() && !s.StorageSettled
}

// Equal says whether two specs ask for the same. The node selector counts:
// compare with SameRun to see whether a node has to do anything.
func (s Spec) Equal(o Spec) bool {
	return s.SameRun(o) && maps.Equal(s.NodeSelector, o.NodeSelector)
}

// SameRun says whether a session that runs as o needs no change to run as s. The
// node selector does not count: it is for placing, and a placed session stays.
func (s Spec) SameRun(o Spec) bool {
	return s.SameContainer(o) && s.Resources == o.Resources
}

// SameContainer says whether a container made for o can become one for s in
// place: CPU, memory and PID limits can change while it runs. New keys of its
// object storage make a new container: what mounts the bucket begins anew.
func (s Spec) SameContainer(o Spec) bool {
	return s.Image == o.Image && s.OpenCodeConfig == o.OpenCodeConfig &&
		s.Resources.DiskBytes == o.Resources.DiskBytes && maps.Equal(s.Env, o.Env) && s.Storage.Equal(o.Storage)
}
