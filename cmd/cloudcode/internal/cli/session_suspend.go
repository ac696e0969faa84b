package cli

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	cloudcodev1 "github.com/cloudcode-dev/cloudcode/proto/cloudcode/v1"
)

func newSessionSuspendCmd() *cobra.Command {
	var wait bool
	var timeout time.Duration
	cmd := &cobra.Command{
		Use:   "suspend ID",
		Short: "End a session's container; resume starts it again",
		Long: `Suspend a session: its container ends. With object storage it is saved first, and
then takes nothing on any node; without, its files stay on its node. What ran in
the container ends; files and chats stay.`,
		Args:              args(cobra.ExactArgs(1)),
		ValidArgsFunction: completeSessions(1),
		RunE: func(cmd *cobra.Command, a []string) error {
			name, err := sessionName(a[0])
			if err != nil {
				return err
			}
			if err := positive("timeout", timeout); err != nil {
				return err
			}
			return withClient(cmd, func(c *client) error {
				ctx, cancel := c.request(cmd.Context())
				s, err := c.sessions.SuspendSession(ctx, &cloudcodev1.SuspendSessionRequest{Name: name})
				cancel()
				if err != nil {
					return err
				}
				if wait {
					view := waitView(cmd)
					view.final = phaseSuspended
					if s, err = c.waitSuspended(cmd.Context(), s, timeout, view); err != nil {
						view.finish(false)
						return err
					}
				}
				done := "is being suspended"
				if s.GetState() == cloudcodev1.Session_SUSPENDED {
					done = "suspended"
				}
				return printDone(cmd, s, done)
			})
		},
	}
	cmd.Flags().BoolVarP(&wait, "wait", "w", false, "return when the session is suspended")
	cmd.Flags().DurationVar(&timeout, "timeout", 10*time.Minute, "how long --wait waits")
	return cmd
}

func newSessionResumeCmd() *cobra.Command {
	var wait bool
	var timeout time.Duration
	cmd := &cobra.Command{
		Use:   "resume ID",
		Short: "Start a suspended session, or a lost one elsewhere",
		Long: `Resume a session: with object storage it starts on any node that fits.

A LOST session with object storage is given up on its old node and goes on elsewhere
from its newest checkpoint. Do that when the old node is gone or cut off: what it
has not saved is lost.`,
		Args:              args(cobra.ExactArgs(1)),
		ValidArgsFunction: completeSessions(1),
		RunE: func(cmd *cobra.Command, a []string) error {
			name, err := sessionName(a[0])
			if err != nil {
				return err
			}
			if err := positive("timeout", timeout); err != nil {
				return err
			}
			return withClient(cmd, func(c *client) error {
				ctx, cancel := c.request(cmd.Context())
				s, err := c.sessions.ResumeSession(ctx, &cloudcodev1.ResumeSessionRequest{Name: name})
				cancel()
				if err != nil {
					return err
				}
				if wait {
					return c.waitAndPrint(cmd, s, timeout, starting{waking: true})
				}
				done := "is being resumed"
				if s.GetState() == cloudcodev1.Session_RUNNING {
					done = "runs"
				}
				return printDone(cmd, s, done)
			})
		},
	}
	cmd.Flags().BoolVarP(&wait, "wait", "w", false, "show the start and return when the session is ready")
	cmd.Flags().DurationVar(&timeout, "timeout", 10*time.Minute, "how long --wait waits")
	return cmd
}

func positive(flag string, d time.Duration) error {
	if d <= 0 {
		return usagef("--%s %s: want more than 0", flag, d)
	}
	return nil
}

// printDone prints a session that something was done to.
func printDone(cmd *cobra.Command, s *cloudcodev1.Session, done string) error {
	if outputOf(cmd) != formatTable {
		return printSession(cmd, s)
	}
	_, err := fmt.Fprintf(cmd.OutOrStdout(), "session %s %s\n", idOf(s.GetName()), done)
	return err
}

// waitSuspended returns the session once it is SUSPENDED, or why it will not be.
func (c *client) waitSuspended(ctx context.Context, s *cloudcodev1.Session, timeout time.Duration, view *startView) (*cloudcodev1.Session, error) {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	last, id := s, idOf(s.GetName())
	tick := view.tick
	if view.scr == nil {
		tick = nil
	}
	err := c.observe(ctx, s, func(s *cloudcodev1.Session) (bool, error) {
		if s == nil {
			return false, &Error{Code: "NOT_FOUND", Reason: "DELETED", Msg: "session " + id + " was deleted while it was being suspended", Exit: exitFailed}
		}
		last = s
		view.show(s)
		switch s.GetState() {
		case cloudcodev1.Session_SUSPENDED:
			return true, nil
		case cloudcodev1.Session_SUSPENDING:
			return false, nil
		}
		e := &Error{Code: "FAILED", Reason: s.GetReason(), Exit: exitFailed, Msg: "session " + id + " was not suspended: it is " + s.GetState().String()}
		if w := why(s); w != "" {
			e.Msg += ": " + w
		}
		return false, e
	}, tick)
	switch {
	case errors.Is(err, context.DeadlineExceeded):
		return last, timedOut(last, "is not suspended after "+timeout.String(), "it goes on being saved; look again with `cloudcode session get "+id+"`")
	case errors.Is(err, context.Canceled):
		return last, &Error{Code: "CANCELLED", Msg: "interrupted; session " + id + " goes on being suspended", Exit: exitInterrupted, Err: err}
	}
	return last, err
}
