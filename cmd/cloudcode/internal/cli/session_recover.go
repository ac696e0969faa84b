package cli

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	cloudcodev1 "github.com/cloudcode-dev/cloudcode/proto/cloudcode/v1"
)

func newSessionRecoverCmd() *cobra.Command {
	var profile string
	var dryRun bool
	var timeout time.Duration
	cmd := &cobra.Command{
		Use:   "recover [ID...]",
		Short: "Bring back the sessions that are in a bucket",
		Long: `Create the sessions that have checkpoints in a storage profile's bucket and are not in
this fleet: each goes on from its newest checkpoint. A new fleet over an old bucket
needs nothing but its keys. Without an ID it brings back all that were not deleted;
one that was deleted has to be named. --dry-run only lists what is there.`,
		Example: `  cloudcode session recover --dry-run
  cloudcode session recover main`,
		RunE: func(cmd *cobra.Command, ids []string) error {
			parent, err := resourceName("storageProfiles", profile)
			if err != nil {
				return err
			}
			req := &cloudcodev1.RecoverSessionsRequest{Parent: parent}
			for _, id := range ids {
				name, err := sessionName(id)
				if err != nil {
					return err
				}
				req.SessionIds = append(req.SessionIds, idOf(name))
			}
			if err := positive("timeout", timeout); err != nil {
				return err
			}
			return withClient(cmd, func(c *client) error {
				ctx, cancel := context.WithTimeout(cmd.Context(), timeout)
				defer cancel()
				stop := spin(cmd, "looking into the bucket")
				defer stop()
				if dryRun {
					resp, err := c.storage.ListStoredSessions(ctx, &cloudcodev1.ListStoredSessionsRequest{Parent: parent})
					stop()
					if err != nil {
						return err
					}
					return printStored(cmd, resp, req.GetSessionIds())
				}
				resp, err := c.storage.RecoverSessions(ctx, req)
				stop()
				if err != nil {
					return err
				}
				return printRecovered(cmd, resp)
			})
		},
	}
	f := cmd.Flags()
	f.StringVar(&profile, "profile", "default", "storage profile, `NAME`, whose bucket is looked into")
	f.BoolVar(&dryRun, "dry-run", false, "list what is there, and do nothing")
	f.DurationVar(&timeout, "timeout", savingTimeout, "how long it may take")
	SetEnvName(f, "profile", "")
	SetEnvName(f, "dry-run", "")
	_ = cmd.RegisterFlagCompletionFunc("profile", completeProfiles)
	return cmd
}

func printStored(cmd *cobra.Command, resp *cloudcodev1.ListStoredSessionsResponse, ids []string) error {
	if len(ids) > 0 {
		resp.Sessions = slices.DeleteFunc(resp.GetSessions(), func(s *cloudcodev1.StoredSession) bool { return !slices.Contains(ids, s.GetSessionId()) })
	}
	out := cmd.OutOrStdout()
	switch outputOf(cmd) {
	case formatJSON:
		return printJSON(out, resp)
	case formatName:
		for _, s := range resp.GetSessions() {
			fmt.Fprintln(out, s.GetSessionId())
		}
		return nil
	}
	if len(resp.GetSessions()) == 0 {
		fmt.Fprintln(cmd.ErrOrStderr(), "no session with checkpoints is in this bucket")
		return nil
	}
	rows := make([][]string, 0, len(resp.GetSessions()))
	for _, s := range resp.GetSessions() {
		cp, size := s.GetCheckpoint(), ""
		if cp != nil {
			size = formatBytes(cp.GetBytes())
		}
		prefix := s.GetPrefix()
		if prefix == "" && s.GetMessage() == "" {
			prefix = "/"
		}
		mode := ""
		if s.GetMode() != cloudcodev1.Storage_MODE_UNSPECIFIED {
			mode = strings.ToLower(s.GetMode().String())
		}
		rows = append(rows, []string{s.GetSessionId(), storedState(s), prefix, mode, age(now(), cp.GetCreateTime()), size, s.GetMessage()})
	}
	return printTable(out, []string{"ID", "STATE", "FOLDER", "MODE", "SAVED", "SIZE", "MESSAGE"}, rows)
}

func storedState(s *cloudcodev1.StoredSession) string {
	switch {
	case s.GetMessage() != "":
		return "UNREADABLE"
	case s.GetKnown():
		return "IN THIS FLEET"
	case s.GetDeleteTime() != nil:
		return "DELETED " + age(now(), s.GetDeleteTime()) + " AGO"
	}
	return "RECOVERABLE"
}

func printRecovered(cmd *cobra.Command, resp *cloudcodev1.RecoverSessionsResponse) error {
	out := cmd.OutOrStdout()
	switch outputOf(cmd) {
	case formatJSON:
		if err := printJSON(out, resp); err != nil {
			return err
		}
	case formatName:
		for _, s := range resp.GetSessions() {
			fmt.Fprintln(out, s.GetName())
		}
	default:
		for _, s := range resp.GetSessions() {
			fmt.Fprintf(out, "session %s recovered\n", idOf(s.GetName()))
		}
		if len(resp.GetSessions()) == 0 && len(resp.GetFailures()) == 0 {
			fmt.Fprintln(cmd.ErrOrStderr(), "nothing to recover; `cloudcode session recover --dry-run` lists what is in the bucket")
		}
	}
	var errs []error
	for _, f := range resp.GetFailures() {
		e := &Error{
			Code: "FAILED_PRECONDITION", Reason: f.GetReason(), Exit: exitError, Hint: reasonHints[f.GetReason()],
			Msg: oneLine("session " + f.GetSessionId() + " was not recovered: " + f.GetMessage()),
		}
		if strings.HasPrefix(f.GetReason(), "SESSION_") { // those hints are about sessions of the fleet
			e.Hint = "see `cloudcode session recover --dry-run`"
		}
		errs = append(errs, e)
	}
	return joinErrors(errs)
}
