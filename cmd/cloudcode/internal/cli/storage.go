package cli

import (
	"context"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	cloudcodev1 "github.com/cloudcode-dev/cloudcode/proto/cloudcode/v1"
)

// setStorage is what to set for a server that has no object storage.
const setStorage = "S3_ENDPOINT, S3_BUCKET, S3_ACCESS_KEY_ID and S3_SECRET_ACCESS_KEY"

func newStorageCmd() *cobra.Command {
	cmd := newGroup("storage", "Show the object storage that sessions are kept in")
	cmd.GroupID = GroupFleet
	profiles := &cobra.Command{
		Use:     "profiles",
		Aliases: []string{"list", "ls"},
		Short:   "List the server's storage profiles",
		Long: `List the object storage that the server has been given. A session is kept in the
one named "default" unless it names another with --storage-profile.`,
		Args: args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			return withClient(cmd, func(c *client) error {
				profiles, err := c.listProfiles(cmd.Context())
				if err != nil {
					return err
				}
				return printProfiles(cmd, profiles)
			})
		},
	}
	cmd.AddCommand(profiles)
	return cmd
}

func (c *client) listProfiles(ctx context.Context) ([]*cloudcodev1.StorageProfile, error) {
	ctx, cancel := c.request(ctx)
	defer cancel()
	resp, err := c.storage.ListStorageProfiles(ctx, &cloudcodev1.ListStorageProfilesRequest{})
	return resp.GetStorageProfiles(), err
}

func printProfiles(cmd *cobra.Command, profiles []*cloudcodev1.StorageProfile) error {
	out := cmd.OutOrStdout()
	switch outputOf(cmd) {
	case formatJSON:
		return printJSON(out, &cloudcodev1.ListStorageProfilesResponse{StorageProfiles: profiles})
	case formatName:
		for _, p := range profiles {
			fmt.Fprintln(out, p.GetName())
		}
		return nil
	}
	if len(profiles) == 0 {
		fmt.Fprintln(cmd.ErrOrStderr(), "the server has no object storage: sessions are lost with their node; start it with "+setStorage)
		return nil
	}
	rows := make([][]string, 0, len(profiles))
	for _, p := range profiles {
		if p.GetMessage() != "" {
			fmt.Fprintf(cmd.ErrOrStderr(), "%s: %s\n", idOf(p.GetName()), p.GetMessage())
		}
		encrypted := "no"
		if p.GetEncrypted() {
			encrypted = "yes"
		}
		rows = append(rows, []string{idOf(p.GetName()), profileURI(p), p.GetEndpoint(), p.GetRegion(), strings.ToLower(p.GetAutoMode().String()), encrypted})
	}
	return printTable(out, []string{"NAME", "BUCKET", "ENDPOINT", "REGION", "AUTO", "ENCRYPTED"}, rows)
}

func profileURI(p *cloudcodev1.StorageProfile) string {
	uri := "s3://" + p.GetBucket()
	if prefix := strings.Trim(p.GetPrefix(), "/"); prefix != "" {
		uri += "/" + prefix
	}
	return uri
}

// StorageLine says where the server keeps sessions, for a person; empty if it
// does not say.
func StorageLine(cmd *cobra.Command) string {
	line := ""
	_ = withClient(cmd, func(c *client) error {
		profiles, err := c.listProfiles(cmd.Context())
		if err != nil {
			return err
		}
		line = storageLine(profiles)
		return nil
	})
	return line
}

func storageLine(profiles []*cloudcodev1.StorageProfile) string {
	for _, p := range profiles {
		if idOf(p.GetName()) == "default" {
			return oneLine("sessions are kept in " + profileURI(p) + " at " + p.GetEndpoint())
		}
	}
	return "sessions are not persistent beyond this machine's disk: set " + setStorage + " to keep them in object storage"
}

func completeProfiles(cmd *cobra.Command, _ []string, _ string) ([]cobra.Completion, cobra.ShellCompDirective) {
	return completeFrom(cmd, func(ctx context.Context, c *client) ([]cobra.Completion, error) {
		all, err := c.listProfiles(ctx)
		var out []cobra.Completion
		for _, p := range all {
			out = append(out, cobra.CompletionWithDesc(idOf(p.GetName()), profileURI(p)))
		}
		return out, err
	})
}
