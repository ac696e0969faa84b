package cli

import (
	"context"
	"fmt"
	"net/url"
	"os"
	"os/exec"
	"time"

	"github.com/spf13/cobra"

	cloudcodev1 "github.com/cloudcode-dev/cloudcode/proto/cloudcode/v1"
)

func newSessionOpenCmd() *cobra.Command {
	var printOnly bool
	cmd := &cobra.Command{
		Use:   "open ID",
		Short: "Open a session's OpenCode in the browser",
		Long: `Print the address of a session's OpenCode and open it in a browser, if this
machine has one. The line that begins with "opencode attach" joins from a terminal.`,
		Args:              args(cobra.ExactArgs(1)),
		ValidArgsFunction: completeSessions(1),
		RunE: func(cmd *cobra.Command, a []string) error {
			return withClient(cmd, func(c *client) error {
				s, err := c.getSession(cmd.Context(), a[0])
				if err != nil {
					return err
				}
				return openSession(cmd, s, printOnly)
			})
		},
	}
	cmd.Flags().BoolVar(&printOnly, "print", false, "print the address and do nothing else")
	return cmd
}

func openSession(cmd *cobra.Command, s *cloudcodev1.Session, printOnly bool) error {
	id := idOf(s.GetName())
	if s.GetWebUri() == "" {
		return &Error{
			Code: "FAILED_PRECONDITION", Reason: "NO_GATEWAY", Exit: exitConflict,
			Msg:  "session " + id + " has no address yet: no gateway has joined the server",
			Hint: "start one with `cloudcode gateway`",
		}
	}
	// It comes from the server and goes to another program.
	if u, err := url.Parse(s.GetWebUri()); err != nil || u.Scheme != "http" && u.Scheme != "https" {
		return fmt.Errorf("the server gave %q as the address of session %s: not an http address", s.GetWebUri(), id)
	}
	out, hints := cmd.OutOrStdout(), cmd.ErrOrStderr()
	if outputOf(cmd) == formatJSON {
		if err := printValueJSON(out, map[string]string{"webUri": s.GetWebUri(), "attach": attachLine(s)}); err != nil {
			return err
		}
	} else if _, err := fmt.Fprintln(out, s.GetWebUri()); err != nil {
		return err
	}
	if printOnly {
		return nil
	}
	if s.GetState() != cloudcodev1.Session_RUNNING {
		fmt.Fprintf(hints, "session %s is %s; it answers once it is RUNNING (see `cloudcode session get %s`)\n", id, s.GetState(), id)
	}
	if outputOf(cmd) != formatJSON {
		fmt.Fprintln(hints, attachLine(s))
	}
	opener := browser()
	if opener == "" {
		return nil
	}
	// Some openers stay as long as the browser does: that is not waited for.
	ctx, cancel := context.WithTimeout(cmd.Context(), 5*time.Second)
	defer cancel()
	if err := exec.CommandContext(ctx, opener, s.GetWebUri()).Run(); err != nil && ctx.Err() == nil {
		fmt.Fprintf(hints, "the browser could not be opened (%s: %s); open the address yourself\n", opener, oneLine(err.Error()))
	}
	return nil
}

// browser returns the program that opens addresses; empty without a desktop.
func browser() string {
	if os.Getenv("DISPLAY") == "" && os.Getenv("WAYLAND_DISPLAY") == "" {
		return ""
	}
	path, err := exec.LookPath("xdg-open")
	if err != nil {
		return ""
	}
	return path
}
