package fleet

import (
	"fmt"
	"maps"
	"slices"
)

// States lists all states of a session.
var States = []State{StatePending, StateStarting, StateRunning, StateFailed, StateLost, StateDeleting}

// moves says which state may follow which. Staying in a state is always allowed.
var moves = map[State][]State{
	"":            {StatePending}, // made
	StatePending:  {StateStarting, StateDeleting},
	StateStarting: {StateRunning, StateFailed, StateLost, StateDeleting},
	StateRunning:  {StateStarting, StateFailed, StateLost, StateDeleting},
	StateFailed:   {StateStarting, StateRunning, StateLost, StateDeleting},
	StateLost:     {StateStarting, StateRunning, StateFailed, StateDeleting},
	StateDeleting: nil, // final: what follows is that the session is gone
}

// CanBecome says whether a session in state s may move to another state.
func (s State) CanBecome(to State) bool { return s == to || slices.Contains(moves[s], to) }

// SetState moves the session, with the reason and what a person should know.
// Everything that changes a state does it here. Returns ErrFailedPrecondition if
// the state does not allow the move; then nothing is changed. Progress is kept
// only while the session starts.
func (s *Session) SetState(to State, reason, message string) error {
	if !s.State.CanBecome(to) {
		return fmt.Errorf("%w: session %s is %s and cannot become %s", ErrFailedPrecondition, s.ID, s.State, to)
	}
	s.State, s.Reason, s.Message = to, reason, message
	if to != StateStarting {
		s.Progress = nil
	}
	return nil
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
// place: CPU, memory and PID limits can change while it runs.
func (s Spec) SameContainer(o Spec) bool {
	return s.Image == o.Image && s.OpenCodeConfig == o.OpenCodeConfig &&
		s.Resources.DiskBytes == o.Resources.DiskBytes && maps.Equal(s.Env, o.Env)
}
