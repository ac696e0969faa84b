package fleet

import (
	"errors"
	"testing"
)

func TestMoves(t *testing.T) {
	// Rows: from. Columns in the order of States: PENDING STARTING RUNNING FAILED LOST DELETING.
	table := map[State]string{
		"":            "P.....",
		StatePending:  "PS...D",
		StateStarting: ".SRFLD",
		StateRunning:  ".SRFLD",
		StateFailed:   ".SRFLD",
		StateLost:     ".SRFLD",
		StateDeleting: ".....D",
	}
	for from, row := range table {
		for i, to := range States {
			s := &Session{ID: "a", State: from, Reason: "OLD", Progress: &Progress{Phase: "image"}}
			err := s.SetState(to, "NEW", "text")
			if allowed := row[i] != '.'; allowed != (err == nil) {
				t.Errorf("%q to %s: allowed is %v, error %v", from, to, allowed, err)
			}
			if err != nil {
				if !errors.Is(err, ErrFailedPrecondition) || s.State != from || s.Reason != "OLD" || s.Progress == nil {
					t.Errorf("%q to %s: refused with %v, but the session became %+v", from, to, err, s)
				}
				continue
			}
			if s.State != to || s.Reason != "NEW" || s.Message != "text" || (s.Progress != nil) != (to == StateStarting) {
				t.Errorf("%q to %s: %+v", from, to, s)
			}
		}
	}
}

func TestSpecCompare(t *testing.T) {
	base := func() Spec {
		return Spec{
			Image: "i", Env: map[string]string{"A": "1"}, OpenCodeConfig: "{}",
			Resources: Resources{CPUMillis: 1, MemoryBytes: 1, PIDs: 1, DiskBytes: 1}, NodeSelector: map[string]string{"z": "1"},
		}
	}
	for _, c := range []struct {
		name                 string
		change               func(*Spec)
		equal, run, contains bool
	}{
		{"nothing", func(*Spec) {}, true, true, true},
		{"image", func(s *Spec) { s.Image = "j" }, false, false, false},
		{"env", func(s *Spec) { s.Env["A"] = "2" }, false, false, false},
		{"config", func(s *Spec) { s.OpenCodeConfig = "" }, false, false, false},
		{"disk", func(s *Spec) { s.Resources.DiskBytes++ }, false, false, false},
		{"cpu", func(s *Spec) { s.Resources.CPUMillis++ }, false, false, true},
		{"memory", func(s *Spec) { s.Resources.MemoryBytes++ }, false, false, true},
		{"pids", func(s *Spec) { s.Resources.PIDs++ }, false, false, true},
		{"selector", func(s *Spec) { s.NodeSelector["z"] = "2" }, false, true, true},
	} {
		a, b := base(), base()
		c.change(&b)
		if a.Equal(b) != c.equal || a.SameRun(b) != c.run || a.SameContainer(b) != c.contains {
			t.Errorf("%s: %v %v %v", c.name, a.Equal(b), a.SameRun(b), a.SameContainer(b))
		}
	}
}

func TestCloneSharesNothing(t *testing.T) {
	s := &Session{
		Labels: map[string]string{"a": "1"}, Spec: Spec{Env: map[string]string{"a": "1"}, NodeSelector: map[string]string{"a": "1"}},
		Progress: &Progress{Phase: "image"}, Assignment: &Assignment{Node: "n", Spec: Spec{Env: map[string]string{"a": "1"}}},
	}
	c := s.Clone()
	c.Labels["a"], c.Spec.Env["a"], c.Spec.NodeSelector["a"] = "2", "2", "2"
	c.Progress.Phase, c.Assignment.Node, c.Assignment.Spec.Env["a"] = "2", "2", "2"
	if s.Labels["a"] != "1" || s.Spec.Env["a"] != "1" || s.Spec.NodeSelector["a"] != "1" ||
		s.Progress.Phase != "image" || s.Assignment.Node != "n" || s.Assignment.Spec.Env["a"] != "1" {
		t.Fatalf("shared: %+v", s)
	}
}
