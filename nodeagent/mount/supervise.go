package mount

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"
)

// State of a supervised mount.
type State int

// States of a Supervisor.
const (
	Mounted    State = iota + 1 // it answers
	Remounting                  // it has failed; it is mounted anew
	Failed                      // that has failed several times; it is still tried
)

func (s State) String() string {
	switch s {
	case Mounted:
		return "MOUNTED"
	case Remounting:
		return "REMOUNTING"
	case Failed:
		return "FAILED"
	}
	return "UNKNOWN"
}

// Supervisor keeps one mount of a session working: it probes it, and mounts it
// anew when it is dead or hangs. Start, then one of Stop, Close and Abandon; they
// wait for what runs here. Abandon may be called at any time, also during the others.
type Supervisor struct {
	Mounter Mounter
	Spec    Spec
	Log     *slog.Logger

	// OnChange is told the state, and what to say about it, when either changes.
	// It is called from one goroutine at a time and must not wait for the Supervisor.
	OnChange func(state State, message string)
	// Own, if not nil, says whether what is mounted is still ours to write to. It is
	// asked before a mounter is started that would write what a dead one left.
	Own func(ctx context.Context) error
	// Resume says that nobody else has written there since the mount was made last,
	// perhaps by an earlier daemon: Start goes on with what a dead mounter left.
	Resume bool
	// Remounted is called after the mount was made anew, before it counts as
	// mounted: who has bound it elsewhere attaches it again. An error is a failure
	// like that of mounting.
	Remounted func(ctx context.Context) error

	// Interval between probes, each of which is a child process; 5 s. HungAfter is how long a mount may not answer
	// before its mounter is killed with what it has not written; 20 s.
	Interval, HungAfter time.Duration

	cancel context.CancelFunc
	done   chan struct{} // closed when run has returned
	state  State
	said   string
}

const (
	firstRemount = time.Second
	longRemount  = time.Minute
	failedAfter  = 5 // tries in a row
	// remountTimeout bounds one try, with what Remounted does.
	remountTimeout = 2 * time.Minute
	// stableAfter is how long a mount must have answered for its failures to be forgotten.
	stableAfter = 5 * time.Minute
)

// Start mounts, or adopts what is there, and watches it from then on. With an error
// of Mounter.Mount nothing runs.
func (s *Supervisor) Start(ctx context.Context) error {
	if s.Interval <= 0 {
		s.Interval = 5 * time.Second
	}
	if s.HungAfter <= 0 {
		s.HungAfter = 20 * time.Second
	}
	if s.Log == nil {
		s.Log = slog.New(slog.DiscardHandler)
	}
	if err := s.mounting(s.Resume)(ctx, s.Spec); err != nil {
		return err
	}
	s.change(Mounted, "")
	// It outlives the call that started it.
	ctx, s.cancel = context.WithCancel(context.WithoutCancel(ctx))
	s.done = make(chan struct{})
	go func() {
		defer close(s.done)
		s.run(ctx)
	}()
	return nil
}

// Stop ends the watching and leaves the mount as it is: the daemon ends, its mounts do not.
func (s *Supervisor) Stop() {
	if s.cancel == nil {
		return
	}
	s.cancel()
	<-s.done
}

// Close stops, and unmounts as Mounter.Unmount does. If that fails the mount is
// still there, unwatched: call Close again, or Abandon.
func (s *Supervisor) Close(ctx context.Context) error {
	s.Stop()
	return s.Mounter.Unmount(ctx, s.Spec.ID)
}

// Abandon stops, and fences as Mounter.Abandon does.
func (s *Supervisor) Abandon(ctx context.Context) error {
	if s.cancel != nil {
		s.cancel() // before the fence, and waited for after it: nothing may mount again behind it
	}
	err := s.Mounter.Abandon(ctx, s.Spec.ID)
	if s.cancel == nil {
		return err
	}
	select {
	case <-s.done:
	case <-ctx.Done():
		return errors.Join(err, ctx.Err())
	}
	if again := s.Mounter.Abandon(ctx, s.Spec.ID); again != nil {
		return again
	}
	return nil
}

func (s *Supervisor) change(state State, message string) {
	if s.state == state && s.said == message {
		return
	}
	s.state, s.said = state, message
	if s.OnChange != nil {
		s.OnChange(state, message)
	}
}

func (s *Supervisor) run(ctx context.Context) {
	var hungSince, mountedAt time.Time
	failures := 0
	for sleep(ctx, s.Interval) {
		asked := time.Now()
		err := s.Mounter.Probe(ctx, s.Spec.ID)
		if ctx.Err() != nil {
			return
		}
		if err == nil {
			hungSince = time.Time{}
			if failures > 0 && time.Since(mountedAt) >= stableAfter {
				failures = 0
			}
			continue
		}
		if errors.Is(err, ErrHung) {
			if hungSince.IsZero() {
				hungSince = asked
			}
			if time.Since(hungSince) < s.HungAfter {
				continue // perhaps it only has much to do; killing it loses what it has not written
			}
		}
		if !s.heal(ctx, err, &failures) {
			return
		}
		hungSince, mountedAt = time.Time{}, time.Now()
	}
}

// heal returns true once the mount works again, false at the end of ctx.
func (s *Supervisor) heal(ctx context.Context, reason error, failures *int) bool {
	s.Log.Warn("mount has failed", "id", s.Spec.ID, "error", reason)
	for {
		state := Remounting
		if *failures >= failedAfter {
			state = Failed
		}
		wait := time.Duration(0)
		if *failures > 0 { // a mount that fails soon after it was made waits, too
			wait = min(firstRemount<<min(*failures-1, 10), longRemount)
		}
		message := reason.Error()
		if wait > 0 {
			message = fmt.Sprintf("%s (try %d in %v)", message, *failures+1, wait)
		}
		s.change(state, message)
		if !sleep(ctx, wait) {
			return false
		}
		*failures++
		if reason = s.remount(ctx); reason == nil {
			s.Log.Info("mount works again", "id", s.Spec.ID, "tries", *failures)
			s.change(Mounted, "")
			return true
		}
		if ctx.Err() != nil {
			return false
		}
		s.Log.Warn("mount cannot be made anew", "id", s.Spec.ID, "error", reason, "tries", *failures)
	}
}

func (s *Supervisor) remount(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, remountTimeout)
	defer cancel()
	if s.Own != nil {
		if err := s.Own(ctx); err != nil {
			return fmt.Errorf("not mounted anew: %w", err)
		}
	}
	// We have watched it all the time: nobody else writes there.
	if err := s.mounting(true)(ctx, s.Spec); err != nil {
		return err
	}
	if s.Remounted == nil {
		return nil
	}
	return s.Remounted(ctx)
}

// mounting is how to mount: with resume, what a dead mounter left is written, where
// the mounter can do that.
func (s *Supervisor) mounting(resume bool) func(context.Context, Spec) error {
	if r, ok := s.Mounter.(Remounter); ok && resume {
		return r.Remount
	}
	return s.Mounter.Mount
}

// sleep returns false at the end of ctx.
func sleep(ctx context.Context, d time.Duration) bool {
	if d <= 0 {
		return ctx.Err() == nil
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}
