package fleet

import (
	"errors"
	"reflect"
	"testing"
	"time"
)

func TestApplyReport(t *testing.T) {
	created := time.Date(2026, 11, 23, 12, 0, 0, 0, time.UTC)
	now := created.Add(time.Hour)
	ready := created.Add(time.Minute)
	session := func(state State, change ...func(*Session)) *Session {
		s := &Session{
			ID: "a", UID: "u1", State: state, UpdateTime: created, Generation: 3,
			Assignment: &Assignment{Node: "n1", Generation: 3},
		}
		for _, c := range change {
			c(s)
		}
		return s
	}
	deleting := func(s *Session) { s.Deleting = true }
	asked := func(s *Session) { s.Deleting, s.Assignment.Delete = true, true }
	progress := func(phase string, n int64) func(*Session) {
		return func(s *Session) { s.Progress = &Progress{Phase: phase, Current: n} }
	}
	report := func(state ReportedState, change ...func(*Report)) Report {
		r := Report{SessionID: "a", SessionUID: "u1", Generation: 3, State: state}
		for _, c := range change {
			c(&r)
		}
		return r
	}
	at := func(phase string, n int64) func(*Report) {
		return func(r *Report) { r.Progress = &Progress{Phase: phase, Current: n} }
	}
	because := func(reason, message string) func(*Report) {
		return func(r *Report) { r.Reason, r.Message = reason, message }
	}
	readyAt := func(r *Report) { r.ReadyTime = ready }
	remote := func(s *Session) { s.Spec.Storage.Mode = ModeSnapshot }
	suspended := func(s *Session) { s.Suspended = true }
	suspending := func(s *Session) { s.Suspended, s.Assignment.Suspend = true, true }
	stored := func(st StorageStatus) func(*Session) { return func(s *Session) { s.Storage = &st } }
	says := func(st StorageStatus) func(*Report) { return func(r *Report) { r.Storage = &st } }
	saved := func(id string) StorageStatus { return StorageStatus{Checkpoint: &Checkpoint{ID: id, Time: created}} }
	unsaved := func(id string) StorageStatus {
		st := saved(id)
		st.UnsavedSince, st.Message, st.MountState, st.Mounter = ready, "m", MountRemounting, "tigrisfs"
		return st
	}
	restore := func(asked, given string) func(*Session) {
		return func(s *Session) { s.RestoreCheckpoint, s.Assignment.RestoreCheckpoint = asked, given }
	}
	asRunning := func(s *Session) { s.ReadyTime = ready }

	tests := []struct {
		name    string
		session *Session
		report  Report
		node    string // empty: n1
		want    *Session
		outcome Outcome
		err     error
	}{
		{name: "other node", session: session(StateStarting), report: report(ReportedRunning), node: "n2", err: ErrStale},
		{name: "not placed", session: session(StatePending, func(s *Session) { s.Assignment = nil }), report: report(ReportedRunning), err: ErrStale},
		{name: "old generation", session: session(StateStarting), report: report(ReportedRunning, func(r *Report) { r.Generation = 2 }), err: ErrStale},
		{name: "generation that never was", session: session(StateStarting), report: report(ReportedRunning, func(r *Report) { r.Generation = 4 }), err: ErrStale},
		{name: "other session of that id", session: session(StateStarting), report: report(ReportedRunning, func(r *Report) { r.SessionUID = "u0" }), err: ErrStale},
		{name: "unknown state", session: session(StateStarting), report: report("DANCING"), err: ErrInvalidArgument},
		{name: "gone, but not to be deleted", session: session(StateRunning), report: report(ReportedGone), err: ErrStale},
		{name: "gone, before the node was asked", session: session(StateDeleting, deleting), report: report(ReportedGone), err: ErrStale},
		{name: "state that cannot follow", session: session(StatePending), report: report(ReportedRunning), err: ErrFailedPrecondition},

		{
			name: "starting, first progress", session: session(StateStarting), report: report(ReportedStarting, at("image", 1)),
			want: session(StateStarting, progress("image", 1)), outcome: Changed,
		},
		{
			name: "progress tick", session: session(StateStarting, progress("image", 1)), report: report(ReportedStarting, at("image", 2)),
			want: session(StateStarting, progress("image", 2)), outcome: Progressed,
		},
		{
			name: "next phase", session: session(StateStarting, progress("image", 1)), report: report(ReportedStarting, at("container", 0)),
			want: session(StateStarting, progress("container", 0)), outcome: Changed,
		},
		{
			name: "nothing new", session: session(StateStarting, progress("image", 1)), report: report(ReportedStarting, at("image", 1)),
			want: session(StateStarting, progress("image", 1)), outcome: Unchanged,
		},
		{
			name: "running", session: session(StateStarting, progress("opencode", 0)),
			report: report(ReportedRunning, readyAt, func(r *Report) { r.OpenCodeVersion = "1.2" }),
			want:   session(StateRunning, func(s *Session) { s.ReadyTime, s.OpenCodeVersion = ready, "1.2" }), outcome: Changed,
		},
		{
			name: "running, and does not say since when", session: session(StateStarting), report: report(ReportedRunning),
			want: session(StateRunning, func(s *Session) { s.ReadyTime = now }), outcome: Changed,
		},
		{
			name: "still running", session: session(StateRunning, func(s *Session) { s.ReadyTime = ready }), report: report(ReportedRunning),
			want: session(StateRunning, func(s *Session) { s.ReadyTime = ready }), outcome: Unchanged,
		},
		{
			name: "running again before anybody saw that it was not", session: session(StateRunning), report: report(ReportedRunning, func(r *Report) { r.RestartCount = 1 }),
			want: session(StateRunning, func(s *Session) { s.RestartCount = 1 }), outcome: Changed,
		},
		{
			name:    "died and starts again",
			session: session(StateRunning, func(s *Session) { s.ReadyTime, s.OpenCodeVersion = ready, "1.2" }),
			report:  report(ReportedStarting, because("OOM_KILLED", "try 1"), func(r *Report) { r.RestartCount = 1 }),
			want: session(StateStarting, func(s *Session) {
				s.Reason, s.Message, s.RestartCount, s.ReadyTime, s.OpenCodeVersion = "OOM_KILLED", "try 1", 1, ready, "1.2"
			}), outcome: Changed,
		},
		{
			name:    "another message alone",
			session: session(StateFailed, func(s *Session) { s.Reason, s.Message = "X", "try 1" }),
			report:  report(ReportedFailed, because("X", "try 2")),
			want:    session(StateFailed, func(s *Session) { s.Reason, s.Message = "X", "try 2" }), outcome: Progressed,
		},
		{
			name: "failed", session: session(StateStarting, progress("image", 1)), report: report(ReportedFailed, because("IMAGE_NOT_FOUND", "m")),
			want: session(StateFailed, func(s *Session) { s.Reason, s.Message = "IMAGE_NOT_FOUND", "m" }), outcome: Changed,
		},
		{
			name:    "lost, and its node says that it runs",
			session: session(StateLost, func(s *Session) { s.Reason, s.Message, s.ReadyTime = ReasonNodeUnreachable, "m", ready }),
			report:  report(ReportedRunning, readyAt),
			want:    session(StateRunning, func(s *Session) { s.ReadyTime = ready }), outcome: Changed,
		},
		{
			name: "deleting, node not asked yet", session: session(StateDeleting, deleting), report: report(ReportedRunning, readyAt),
			want: session(StateDeleting, deleting), outcome: Unchanged,
		},
		{
			name: "deleting stays deleting", session: session(StateDeleting, asked), report: report(ReportedRunning, readyAt),
			want: session(StateDeleting, asked), outcome: Unchanged,
		},
		{
			name: "deleting, and cannot", session: session(StateDeleting, asked), report: report(ReportedFailed, because("DELETE_FAILED", "busy")),
			want: session(StateDeleting, asked, func(s *Session) { s.Reason, s.Message = "DELETE_FAILED", "busy" }), outcome: Changed,
		},
		{
			name:    "deleting, unreachable is not the node's to take back",
			session: session(StateDeleting, asked, func(s *Session) { s.Reason, s.Message = ReasonNodeUnreachable, "m" }),
			report:  report(ReportedStarting),
			want:    session(StateDeleting, asked, func(s *Session) { s.Reason, s.Message = ReasonNodeUnreachable, "m" }), outcome: Unchanged,
		},
		{
			name: "gone", session: session(StateDeleting, asked), report: report(ReportedGone),
			want: session(StateDeleting, deleting, func(s *Session) { s.Assignment = nil }), outcome: Progressed,
		},
		{
			name: "gone, and its object storage is asked", session: session(StateDeleting, asked, remote), report: report(ReportedGone),
			want: session(StateDeleting, deleting, remote, func(s *Session) { s.Assignment = nil }), outcome: Progressed,
		},
		{
			name: "gone, and to be purged", session: session(StateDeleting, asked, func(s *Session) { s.Purge = true }), report: report(ReportedGone),
			want: session(StateDeleting, deleting, func(s *Session) { s.Assignment, s.Purge = nil, true }), outcome: Progressed,
		},

		{name: "suspended, and nobody asked", session: session(StateRunning, remote), report: report(ReportedSuspended), err: ErrStale},
		{name: "suspended before the node was asked", session: session(StateSuspending, remote, suspended), report: report(ReportedSuspended), err: ErrStale},
		{name: "suspended, and resumed meanwhile", session: session(StateStarting, remote, func(s *Session) { s.Assignment.Suspend = true }), report: report(ReportedSuspending), err: ErrStale},
		{
			name: "runs, as the node has not heard of the suspension", session: session(StateSuspending, remote, suspended), report: report(ReportedRunning, readyAt),
			want: session(StateSuspending, remote, suspended), outcome: Unchanged,
		},
		{
			name: "being saved", session: session(StateSuspending, remote, suspending), report: report(ReportedSuspending, at("checkpoint", 5)),
			want: session(StateSuspending, remote, suspending, progress("checkpoint", 5)), outcome: Changed,
		},
		{
			name: "more is saved", session: session(StateSuspending, remote, suspending, progress("checkpoint", 5)), report: report(ReportedSuspending, at("checkpoint", 6)),
			want: session(StateSuspending, remote, suspending, progress("checkpoint", 6)), outcome: Progressed,
		},
		{
			name: "cannot be saved", session: session(StateSuspending, remote, suspending), report: report(ReportedFailed, because("STORAGE_UNREACHABLE", "m")),
			want: session(StateSuspending, remote, suspending, func(s *Session) { s.Reason, s.Message = "STORAGE_UNREACHABLE", "m" }), outcome: Changed,
		},
		{
			name:    "suspended with object storage leaves its node",
			session: session(StateSuspending, remote, suspending, progress("checkpoint", 5), stored(unsaved("c1"))), report: report(ReportedSuspended, says(saved("c2"))),
			want: session(StateSuspended, remote, suspended, stored(saved("c2")), func(s *Session) { s.Assignment = nil }), outcome: Changed,
		},
		{
			name: "suspended on its node", session: session(StateSuspending, suspending), report: report(ReportedSuspended),
			want: session(StateSuspended, suspending), outcome: Changed,
		},
		{
			name: "suspended stays so", session: session(StateSuspended, suspending), report: report(ReportedStarting),
			want: session(StateSuspended, suspending), outcome: Unchanged,
		},
		{
			name: "suspended while lost", session: session(StateLost, suspending), report: report(ReportedSuspended),
			want: session(StateSuspended, suspending), outcome: Changed,
		},

		{
			name: "saved once more", session: session(StateRunning, asRunning, stored(saved("c1"))), report: report(ReportedRunning, readyAt, says(saved("c2"))),
			want: session(StateRunning, asRunning, stored(saved("c2"))), outcome: Progressed,
		},
		{
			name: "saved as before", session: session(StateRunning, asRunning, stored(saved("c1"))), report: report(ReportedRunning, readyAt, says(saved("c1"))),
			want: session(StateRunning, asRunning, stored(saved("c1"))), outcome: Unchanged,
		},
		{
			name: "cannot be saved any more", session: session(StateRunning, asRunning, stored(saved("c1"))), report: report(ReportedRunning, readyAt, says(unsaved("c1"))),
			want: session(StateRunning, asRunning, stored(unsaved("c1"))), outcome: Changed,
		},
		{
			name: "names no checkpoint", session: session(StateRunning, asRunning, stored(saved("c1"))), report: report(ReportedRunning, readyAt, says(StorageStatus{})),
			want: session(StateRunning, asRunning, stored(saved("c1"))), outcome: Unchanged,
		},
		{
			name: "being taken back", session: session(StateStarting, restore("c1", "c1")), report: report(ReportedStarting, at("restore", 1)),
			want: session(StateStarting, restore("c1", "c1"), progress("restore", 1)), outcome: Changed,
		},
		{
			name: "taken back", session: session(StateStarting, restore("c1", "c1")), report: report(ReportedRunning, readyAt),
			want: session(StateRunning, asRunning), outcome: Changed,
		},
		{
			name: "asked for something else meanwhile", session: session(StateStarting, restore("c2", "c1"), stored(saved("c1"))), report: report(ReportedRunning, readyAt, says(saved("c3"))),
			want: session(StateStarting, restore("c2", "c1"), stored(saved("c3"))), outcome: Progressed,
		},
		{
			name: "resumed, and not heard of it", session: session(StateStarting, func(s *Session) { s.Assignment.Suspend = true }), report: report(ReportedRunning, readyAt),
			want: session(StateStarting, func(s *Session) { s.Assignment.Suspend = true }), outcome: Unchanged,
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			node := tt.node
			if node == "" {
				node = "n1"
			}
			got := tt.session.Clone()
			outcome, err := got.ApplyReport(tt.report, node, now)
			if !errors.Is(err, tt.err) {
				t.Fatalf("error %v, want %v", err, tt.err)
			}
			want := tt.want
			if tt.err != nil {
				want = tt.session
			} else if tt.outcome != Unchanged {
				want.UpdateTime = now
			}
			if outcome != tt.outcome {
				t.Errorf("outcome %d, want %d", outcome, tt.outcome)
			}
			if !reflect.DeepEqual(got, want) {
				t.Errorf("session is\n%+v\nwant\n%+v", got, want)
			}
		})
	}
}
