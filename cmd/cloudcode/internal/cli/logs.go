package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"time"

	"github.com/spf13/cobra"

	cloudcodev1 "github.com/cloudcode-dev/cloudcode/proto/cloudcode/v1"
)

func newSessionLogsCmd() *cobra.Command {
	var follow, timestamps bool
	var tail int
	cmd := &cobra.Command{
		Use:   "logs ID",
		Short: "Show what a session's container wrote to stdout and stderr",
		Example: `  cloudcode session logs main --tail 50 -f
  cloudcode session logs main -o json | jq -r 'select(.stream == "stderr").line'`,
		Args:              args(cobra.ExactArgs(1)),
		ValidArgsFunction: completeSessions(1),
		RunE: func(cmd *cobra.Command, a []string) error {
			name, err := sessionName(a[0])
			if err != nil {
				return err
			}
			if tail < 0 || tail > math.MaxInt32 {
				return usagef("--tail %d: want 0 (everything) or more", tail)
			}
			req := &cloudcodev1.ReadSessionLogsRequest{Name: name, Follow: follow, TailLines: int32(tail)}
			out, asJSON := cmd.OutOrStdout(), outputOf(cmd) == formatJSON
			return withClient(cmd, func(c *client) error {
				return c.readLogs(cmd.Context(), req, func(e *cloudcodev1.LogEntry) error {
					return printLog(out, e, asJSON, timestamps)
				}, func(err error) {
					fmt.Fprintf(cmd.ErrOrStderr(), "connection lost (%s); trying again\n", explain(err).Msg)
				})
			})
		},
	}
	f := cmd.Flags()
	f.BoolVarP(&follow, "follow", "f", false, "go on with new lines as they come")
	f.IntVar(&tail, "tail", 0, "begin with the last so many lines; 0: all that are kept")
	f.BoolVar(&timestamps, "timestamps", false, "put the time in front of each line")
	return cmd
}

func printLog(w io.Writer, e *cloudcodev1.LogEntry, asJSON, timestamps bool) error {
	if asJSON {
		line, err := jsonOf(e, false)
		if err != nil {
			return err
		}
		_, err = fmt.Fprintf(w, "%s\n", line)
		return err
	}
	if timestamps {
		if _, err := fmt.Fprint(w, e.GetTime().AsTime().UTC().Format(time.RFC3339Nano), " "); err != nil {
			return err
		}
	}
	_, err := fmt.Fprintln(w, e.GetLine())
	return err
}

// readLogs calls fn for every line. When it follows and the connection breaks,
// it reads again and leaves out what fn has had: lines have no ids, so that is
// all lines before the last one's time, and as many of that very time as were seen.
func (c *client) readLogs(ctx context.Context, req *cloudcodev1.ReadSessionLogsRequest, fn func(*cloudcodev1.LogEntry) error, lost func(error)) error {
	var last time.Time
	var sameTime int // entries seen with exactly that time
	connected, broken := false, false
	pause, lastHeard := c.pace.minPause, time.Now()
	for {
		skip, skipUntil := sameTime, last
		err := c.readLogsOnce(ctx, req, func(e *cloudcodev1.LogEntry) error {
			broken, pause, lastHeard = false, c.pace.minPause, time.Now()
			t := e.GetTime().AsTime()
			if connected {
				if t.Before(skipUntil) {
					return nil
				}
				if t.Equal(skipUntil) && skip > 0 {
					skip--
					return nil
				}
			}
			if t.Equal(last) {
				sameTime++
			} else {
				last, sameTime = t, 1
			}
			return fn(e)
		})
		switch {
		case ctx.Err() != nil:
			return context.Cause(ctx)
		case errors.Is(err, io.EOF):
			return nil // all that there is; a follower's stream ends with the session
		case !req.GetFollow() || last.IsZero() || !transient(err):
			return err
		case time.Since(lastHeard) > c.pace.giveUp:
			return fmt.Errorf("gave up after %s: %w", c.pace.giveUp, err)
		}
		connected = true
		req.TailLines = 0
		if !broken && lost != nil {
			lost(err)
		}
		broken = true
		if err := sleep(ctx, pause); err != nil {
			return err
		}
		pause = min(2*pause, c.pace.maxPause)
	}
}

func (c *client) readLogsOnce(ctx context.Context, req *cloudcodev1.ReadSessionLogsRequest, fn func(*cloudcodev1.LogEntry) error) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := c.sessions.ReadSessionLogs(ctx, req)
	if err != nil {
		return err
	}
	for {
		e, err := stream.Recv()
		if err != nil {
			return err
		}
		if err := fn(e); err != nil {
			return err
		}
	}
}
