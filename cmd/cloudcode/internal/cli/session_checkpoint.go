package cli

import (
	"context"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/google/uuid"
	"github.com/spf13/cobra"

	cloudcodev1 "github.com/cloudcode-dev/cloudcode/proto/cloudcode/v1"
)

// savingTimeout is how long a save of a whole session is waited for.
const savingTimeout = 10 * time.Minute

func newSessionCheckpointCmd() *cobra.Command {
	var timeout time.Duration
	cmd := &cobra.Command{
		Use:   "checkpoint ID",
		Short: "Save a session now",
		Long: `Save a session and return once that is in object storage: files and chats as of one
moment. Sessions are saved by themselves, too: after each turn of a chat, and while
they work.`,
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
				ctx, cancel := context.WithTimeout(cmd.Context(), timeout)
				defer cancel()
				stop := spin(cmd, "saving "+idOf(name))
				cp, err := c.sessions.CheckpointSession(ctx, &cloudcodev1.CheckpointSessionRequest{Name: name})
				stop()
				if err != nil {
					return err
				}
				switch out := cmd.OutOrStdout(); outputOf(cmd) {
				case formatJSON:
					return printJSON(out, cp)
				case formatName:
					_, err = fmt.Fprintln(out, cp.GetId())
				default:
					_, err = fmt.Fprintf(out, "session %s saved: %s\n", idOf(name), oneLine(checkpointText(cp)))
					printNotes(cmd, cp)
				}
				return err
			})
		},
	}
	cmd.Flags().DurationVar(&timeout, "timeout", savingTimeout, "how long it may take")
	return cmd
}

// printNotes says what of a checkpoint is not exactly as it was.
func printNotes(cmd *cobra.Command, cp *cloudcodev1.Checkpoint) {
	for _, n := range cp.GetNotes() {
		fmt.Fprintf(cmd.ErrOrStderr(), "  note: %s\n", oneLine(n))
	}
}

func newSessionCheckpointsCmd() *cobra.Command {
	return &cobra.Command{
		Use:   "checkpoints ID",
		Short: "List what a session can be restored to",
		Example: `  cloudcode session checkpoints main
  cloudcode session restore main --at 20261124t2149`,
		Args:              args(cobra.ExactArgs(1)),
		ValidArgsFunction: completeSessions(1),
		RunE: func(cmd *cobra.Command, a []string) error {
			name, err := sessionName(a[0])
			if err != nil {
				return err
			}
			return withClient(cmd, func(c *client) error {
				all, err := c.listCheckpoints(cmd.Context(), name)
				if err != nil {
					return err
				}
				return printCheckpoints(cmd, all)
			})
		},
	}
}

func (c *client) listCheckpoints(ctx context.Context, name string) ([]*cloudcodev1.Checkpoint, error) {
	var all []*cloudcodev1.Checkpoint
	req := &cloudcodev1.ListCheckpointsRequest{Parent: name, PageSize: 1000}
	for {
		rctx, cancel := c.request(ctx)
		resp, err := c.sessions.ListCheckpoints(rctx, req)
		cancel()
		if err != nil {
			return nil, err
		}
		all = append(all, resp.GetCheckpoints()...)
		if req.PageToken = resp.GetNextPageToken(); req.PageToken == "" {
			return all, nil
		}
	}
}

func printCheckpoints(cmd *cobra.Command, all []*cloudcodev1.Checkpoint) error {
	out := cmd.OutOrStdout()
	switch outputOf(cmd) {
	case formatJSON:
		return printJSON(out, &cloudcodev1.ListCheckpointsResponse{Checkpoints: all})
	case formatName:
		for _, cp := range all {
			fmt.Fprintln(out, cp.GetId())
		}
		return nil
	}
	if len(all) == 0 {
		fmt.Fprintln(cmd.ErrOrStderr(), "no checkpoints yet; `cloudcode session checkpoint` makes one")
		return nil
	}
	header := []string{"ID", "AGE", "TRIGGER", "FILES", "SIZE", "SENT", "NODE"}
	noted := false
	for _, cp := range all {
		noted = noted || len(cp.GetNotes()) > 0
	}
	if noted {
		header = append(header, "NOTES")
	}
	rows := make([][]string, 0, len(all))
	for _, cp := range all {
		row := []string{
			cp.GetId(), age(now(), cp.GetCreateTime()), cp.GetTrigger(), strconv.FormatInt(cp.GetFiles(), 10),
			formatBytes(cp.GetBytes()), formatBytes(cp.GetUploadedBytes()), idOf(cp.GetNode()),
		}
		if noted {
			row = append(row, strings.Join(cp.GetNotes(), "; "))
		}
		rows = append(rows, row)
	}
	return printTable(out, header, rows)
}

// completeCheckpoints completes the checkpoints of the session that is the first argument.
func completeCheckpoints(cmd *cobra.Command, given []string, _ string) ([]cobra.Completion, cobra.ShellCompDirective) {
	if len(given) == 0 {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	name, err := sessionName(given[0])
	if err != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	out, directive := completeFrom(cmd, func(ctx context.Context, c *client) ([]cobra.Completion, error) {
		all, err := c.listCheckpoints(ctx, name)
		var out []cobra.Completion
		for _, cp := range all {
			out = append(out, cobra.CompletionWithDesc(cp.GetId(), age(now(), cp.GetCreateTime())+" ago, "+cp.GetTrigger()))
		}
		return out, err
	})
	return out, directive | cobra.ShellCompDirectiveKeepOrder // newest first
}

func newSessionRestoreCmd() *cobra.Command {
	var at string
	var yes, wait bool
	var timeout time.Duration
	cmd := &cobra.Command{
		Use:   "restore ID --at CHECKPOINT",
		Short: "Take a session's files and chats back to a checkpoint",
		Long: `Take a session back to a checkpoint. It is saved as it is first, so that this can be
undone the same way; then its container starts anew. CHECKPOINT is an id of
"cloudcode session checkpoints", or the beginning of one.

It asks first on a terminal, and wants --yes elsewhere. To look at a checkpoint
without touching the session, fork it.`,
		Example:           `  cloudcode session restore main --at 20261124t214900 --wait`,
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
				before, err := c.getSession(cmd.Context(), name)
				if err != nil {
					return err
				}
				if !yes {
					question := "Take session " + idOf(name) + " back to checkpoint " + at + "? It is saved as it is now, then its container starts anew."
					if err := confirm(cmd, question, "nothing was restored", "add --yes to restore without being asked"); err != nil {
						return err
					}
				}
				ctx, cancel := context.WithTimeout(cmd.Context(), timeout)
				defer cancel()
				s, err := c.sessions.RestoreSession(ctx, &cloudcodev1.RestoreSessionRequest{Name: name, Checkpoint: at})
				if err != nil {
					return err
				}
				if wait {
					how := starting{waking: true}
					// What ran before may still be seen for a moment.
					if s.GetState() != cloudcodev1.Session_RUNNING {
						how.generation = before.GetGeneration() + 1
					}
					return c.waitAndPrint(cmd, s, timeout, how)
				}
				return printDone(cmd, s, "is being restored")
			})
		},
	}
	f := cmd.Flags()
	f.StringVar(&at, "at", "", "`CHECKPOINT` to go back to")
	f.BoolVarP(&yes, "yes", "y", false, "do not ask")
	f.BoolVarP(&wait, "wait", "w", false, "show the start and return when the session is ready")
	f.DurationVar(&timeout, "timeout", savingTimeout, "how long it may take")
	_ = cmd.MarkFlagRequired("at")
	SetEnvName(f, "at", "")
	_ = cmd.RegisterFlagCompletionFunc("at", completeCheckpoints)
	return cmd
}

func newSessionForkCmd() *cobra.Command {
	var at string
	var wait bool
	var timeout time.Duration
	cmd := &cobra.Command{
		Use:   "fork ID [NEW-ID]",
		Short: "Make a new session that begins with what another one has",
		Long: `Make a new session that begins with the files and chats of another: as they are now,
or as a checkpoint has them. It shares the stored data, so it takes seconds whatever
the size, and from then on the two have nothing to do with each other.`,
		Example: `  cloudcode session fork main try-it --wait
  cloudcode session fork main --at 20261124t2149`,
		Args:              args(cobra.RangeArgs(1, 2)),
		ValidArgsFunction: completeSessions(1),
		RunE: func(cmd *cobra.Command, a []string) error {
			name, err := sessionName(a[0])
			if err != nil {
				return err
			}
			req := &cloudcodev1.ForkSessionRequest{Name: name, Checkpoint: at, RequestId: uuid.NewString()}
			if len(a) == 2 {
				fork, err := sessionName(a[1])
				if err != nil {
					return err
				}
				req.SessionId = idOf(fork)
			}
			if err := positive("timeout", timeout); err != nil {
				return err
			}
			return withClient(cmd, func(c *client) error {
				ctx, cancel := context.WithTimeout(cmd.Context(), timeout)
				defer cancel()
				stop := spin(cmd, "forking "+idOf(name))
				// The request id makes it safe to ask again.
				s, err := c.retry(ctx, func() (*cloudcodev1.Session, error) { return c.sessions.ForkSession(ctx, req) })
				stop()
				if err != nil {
					return err
				}
				if wait {
					return c.waitAndPrint(cmd, s, timeout, starting{interrupted: "remove it with `cloudcode session delete " + idOf(s.GetName()) + "`"})
				}
				return printCreated(cmd, s)
			})
		},
	}
	f := cmd.Flags()
	f.StringVar(&at, "at", "", "`CHECKPOINT` to begin with (default: as the session is now)")
	f.BoolVarP(&wait, "wait", "w", false, "show the start and return when the new session is ready")
	f.DurationVar(&timeout, "timeout", savingTimeout, "how long it may take")
	SetEnvName(f, "at", "")
	_ = cmd.RegisterFlagCompletionFunc("at", completeCheckpoints)
	return cmd
}
