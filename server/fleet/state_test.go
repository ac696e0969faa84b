package fleet

import (
	"errors"
	"reflect"
	"testing"
	"time"
)

func TestMoves(t *testing.T) {
	// Rows: from. Columns in the order of States: PENDING STARTING RUNNING FAILED LOST
	// DELETING SUSPENDING SUSPENDED.
	table := map[State]string{
		"":              "P.......",
		StatePending:    "PS...D.U",
		StateStarting:   ".SRFLDGU",
		StateRunning:    ".SRFLDGU",
		StateFailed:     ".SRFLDGU",
		StateLost:       "PSRFLDGU",
		StateDeleting:   ".....D..",
		StateSuspending: ".S..LDGU",
		StateSuspended:  "PS...D.U",
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
			if s.State != to || s.Reason != "NEW" || s.Message != "text" || (s.Progress != nil) != (to == StateStarting || to == StateSuspending) {
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
		{"own storage", func(s *Spec) { s.Storage.S3 = &S3{} }, false, false, false},
		{"prefix", func(s *Spec) { s.Storage.Prefix = "x" }, false, false, false},
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
		Storage: &StorageStatus{Checkpoint: &Checkpoint{ID: "c", Notes: []string{"n"}}},
	}
	s.Spec.Storage.S3 = &S3{Bucket: "b"}
	c := s.Clone()
	c.Storage.Checkpoint.ID, c.Storage.Checkpoint.Notes[0], c.Spec.Storage.S3.Bucket = "2", "2", "2"
	if k := s.Storage.Checkpoint; k.ID != "c" || k.Notes[0] != "n" || s.Spec.Storage.S3.Bucket != "b" {
		t.Fatalf("storage is shared: %+v", s)
	}
	c.Labels["a"], c.Spec.Env["a"], c.Spec.NodeSelector["a"] = "2", "2", "2"
	c.Progress.Phase, c.Assignment.Node, c.Assignment.Spec.Env["a"] = "2", "2", "2"
	if s.Labels["a"] != "1" || s.Spec.Env["a"] != "1" || s.Spec.NodeSelector["a"] != "1" ||
		s.Progress.Phase != "image" || s.Assignment.Node != "n" || s.Assignment.Spec.Env["a"] != "1" {
		t.Fatalf("shared: %+v", s)
	}
}

func TestWithoutSecrets(t *testing.T) {
	s := &Session{Assignment: &Assignment{Password: "p"}}
	s.Spec.Storage.S3 = &S3{AccessKeyID: "id", SecretAccessKey: "key"}
	s.Assignment.Spec = s.Spec.Clone()
	c := s.WithoutSecrets()
	if c.Assignment.Password != "" || c.Spec.Storage.S3.SecretAccessKey != "" || c.Assignment.Spec.Storage.S3.SecretAccessKey != "" {
		t.Errorf("secrets are left: %+v", c)
	}
	if c.Spec.Storage.S3.AccessKeyID != "id" || s.Spec.Storage.S3.SecretAccessKey != "key" || s.Assignment.Password != "p" {
		t.Errorf("too much is gone: %+v, %+v", c, s)
	}
}

// TestSuspendAndResume: `state>asked` before and after.
func TestSuspendAndResume(t *testing.T) {
	now := time.Date(2026, 11, 24, 12, 0, 0, 0, time.UTC)
	for _, c := range []struct {
		state                    State
		remote, placed, suspends bool // as it was; suspends: that is asked for, else resume
		asked                    bool // suspended was asked for before
		want                     State
		leaves                   bool // its node
		err                      error
	}{
		{state: StateRunning, remote: true, placed: true, suspends: true, want: StateSuspending},
		{state: StateFailed, placed: true, suspends: true, want: StateSuspending},
		{state: StatePending, suspends: true, want: StateSuspended},
		{state: StateSuspended, asked: true, suspends: true, want: StateSuspended},
		{state: StateLost, placed: true, suspends: true, err: ErrFailedPrecondition},
		{state: StateDeleting, placed: true, suspends: true, err: ErrFailedPrecondition},
		{state: StateDeleting, placed: true, err: ErrFailedPrecondition},
		{state: StateRunning, placed: true, want: StateRunning},
		{state: StateSuspended, asked: true, remote: true, want: StatePending},
		{state: StateSuspended, asked: true, placed: true, want: StateStarting},
		{state: StateSuspending, asked: true, placed: true, remote: true, want: StateStarting},
		{state: StateLost, placed: true, remote: true, want: StatePending, leaves: true},
		{state: StateLost, asked: true, placed: true, remote: true, want: StatePending, leaves: true}, // while it was saved
		{state: StateLost, placed: true, err: ErrFailedPrecondition},
	} {
		s := &Session{
			ID: "a", State: c.state, Suspended: c.asked, Deleting: c.state == StateDeleting, Generation: 4, Progress: &Progress{},
			Storage: &StorageStatus{Checkpoint: &Checkpoint{ID: "k"}, MountState: MountFailed, UnsavedSince: now},
		}
		if c.remote {
			s.Spec.Storage.Mode = ModeSnapshot
		}
		if c.placed {
			s.Assignment = &Assignment{Node: "n1", Generation: 4}
		}
		before := s.Clone()
		err := s.Resume
		if c.suspends {
			err = s.Suspend
		}
		got := err(now)
		if !errors.Is(got, c.err) || (got == nil) != (c.err == nil) {
			t.Errorf("%+v: %v", c, got)
			continue
		}
		if c.err != nil || c.want == c.state {
			if !reflect.DeepEqual(s, before) {
				t.Errorf("%+v: changed to %+v", c, s)
			}
			continue
		}
		if s.State != c.want || s.Suspended != c.suspends || s.Progress != nil || !s.UpdateTime.Equal(now) ||
			(s.Assignment == nil) != (c.leaves || !c.placed) || s.Storage.Checkpoint.ID != "k" {
			t.Errorf("%+v: %+v", c, s)
		}
		if c.leaves && (s.Storage.MountState != "" || !s.Storage.UnsavedSince.IsZero()) {
			t.Errorf("%+v: what the old node said is left: %+v", c, s.Storage)
		}
	}
}

func TestRestore(t *testing.T) {
	now := time.Date(2026, 11, 24, 12, 0, 0, 0, time.UTC)
	for state, want := range map[State]State{
		StateRunning: StateStarting, StateFailed: StateStarting, StatePending: StatePending, StateSuspended: StatePending,
		StateSuspending: StateStarting, StateLost: "", StateDeleting: "",
	} {
		s := &Session{ID: "a", State: state, Deleting: state == StateDeleting}
		s.Spec.Storage.Mode = ModeSnapshot
		s.Suspended = state == StateSuspended || state == StateSuspending
		if state != StatePending && state != StateSuspended {
			s.Assignment = &Assignment{Node: "n1", Suspend: s.Suspended}
		}
		before := s.Clone()
		err := s.Restore("c1", now)
		if want == "" {
			if !errors.Is(err, ErrFailedPrecondition) || !reflect.DeepEqual(s, before) {
				t.Errorf("%s: %v, %+v", state, err, s)
			}
			continue
		}
		if err != nil || s.State != want || s.Suspended || s.RestoreCheckpoint != "c1" || !s.UpdateTime.Equal(now) {
			t.Errorf("%s: %v, %+v", state, err, s)
		}
		again := s.Clone()
		if err := s.Restore("c1", now.Add(time.Hour)); err != nil || !reflect.DeepEqual(s, again) {
			t.Errorf("%s: asked again: %v, %+v", state, err, s)
		}
	}
}
